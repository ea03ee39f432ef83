"""Options by name: `pipe.preset("fast")`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from unclip.types import StageOptions, UnCLIPOptions

PRESETS = ("exact", "fast")


def preset(name: str, options: UnCLIPOptions, upsamplers: Sequence[Any]) -> UnCLIPOptions:
    """A model's own `options` ("exact"), or made several times cheaper at a small loss ("fast").

    upsamplers: their configs.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    if name == "exact":
        return options
    return replace(
        options,
        prior=_fewer(options.prior, 0.4),
        decoder=_fewer(options.decoder, 0.5, guidance_interval=(0.2, 0.9)),
        # A network that was trained for t = 0 alone must not meet another t: ancestral sampling ends there.
        upsamplers=tuple(
            _fewer(stage, 0.6)
            if getattr(config, "last_unet", None) is None
            else replace(stage, steps=max(2, round(0.6 * stage.steps)), reuse=3)
            for stage, config in zip(options.upsamplers, upsamplers, strict=False)
        ),
    )


def _fewer(stage: StageOptions, share: float, **changes: object) -> StageOptions:
    """A share of the steps, by a solver of higher order that makes up for it."""
    return replace(stage, steps=max(2, round(share * stage.steps)), sampler="unipc", **changes)
