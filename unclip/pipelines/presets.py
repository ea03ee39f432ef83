"""Options by name: `pipe.preset("fast")`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from unclip.types import StageOptions

Options = TypeVar("Options")

PRESETS = ("exact", "fast")


def preset(name: str, options: Options, upsamplers: Sequence[Any]) -> Options:
    """A model's own `options` ("exact"), or made several times cheaper at a small loss ("fast").

    upsamplers: their configs.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    if name == "exact":
        return options
    if not hasattr(options, "decoder"):
        raise ValueError(
            f"preset {name!r} takes steps of diffusion less often, and this kind of model has none"
        )
    prior = {"prior": _fewer(options.prior, 0.4)} if hasattr(options, "prior") else {}
    return replace(
        options,
        **prior,
        decoder=_fewer(options.decoder, 0.4, guidance_interval=(0.2, 0.9)),
        # A network that was trained for t = 0 alone must not meet another t: ancestral sampling ends there.
        upsamplers=tuple(
            _fewer(stage, 0.6)
            if getattr(config, "last_unet", None) is None
            else replace(stage, steps=max(2, round(0.45 * stage.steps)), cache_interval=3)
            for stage, config in zip(options.upsamplers, upsamplers, strict=False)
        ),
    )


def _fewer(stage: StageOptions, share: float, **changes: object) -> StageOptions:
    """A share of the steps, by a solver of higher order that makes up for it."""
    return replace(stage, steps=max(2, round(share * stage.steps)), sampler="unipc", **changes)
