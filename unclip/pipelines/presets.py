"""Sampling options by name: `pipe.preset("fast")`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from unclip.types import CodeOptions, StageOptions, UnCLIPOptions

PRESETS = ("exact", "fast")


def preset(name: str, options: Any, separate_last: Sequence[bool] = ()) -> Any:
    """Return a model's own `options` ("exact"), or several times cheaper ones ("fast").

    separate_last: which of the upsamplers have a separate network for the last step.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    if name == "exact":
        return options
    if isinstance(options, CodeOptions):
        raise ValueError(f"preset is {name!r}; expected 'exact' for a model without diffusion")
    prior = {"prior": _fewer(options.prior, 0.4)} if isinstance(options, UnCLIPOptions) else {}
    separate_last = [*separate_last, *[False] * len(options.upsamplers)]
    return replace(
        options,
        **prior,
        decoder=_fewer(options.decoder, 0.4, guidance_interval=(0.2, 0.9)),
        # A network trained only for t = 0 needs ancestral sampling, which ends there.
        upsamplers=tuple(
            _fewer(stage, 0.45, sampler="ancestral", cache_interval=3)
            if separate
            else _fewer(stage, 0.6)
            for stage, separate in zip(options.upsamplers, separate_last, strict=False)
        ),
    )


def _fewer(stage: StageOptions, share: float, **changes: Any) -> StageOptions:
    """Reduce the steps to a share; by default, use a solver of higher order to compensate."""
    steps = max(2, round(share * stage.steps))
    return stage.with_steps(steps, **{"sampler": "unipc", **changes})
