"""What is asked for in words: prompts, mixtures of prompts, and what guidance is to lead away from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unclip.pipelines.base import check_prompts
from unclip.types import Prompt, UnCLIPOptions

# P prompts, K texts in a mixture

Mixture = Mapping[str, float]  # texts and their weights, in proportion to one another


@dataclass(frozen=True)
class PromptBatch:
    """P prompts, or mixtures of them, and as many negative prompts or none."""

    prompts: list[str | dict[str, float]]
    negative: list[str] | None = None

    @classmethod
    def of(
        cls, prompt: Prompt | Mixture | Sequence[str | Mixture], negative: Prompt | None = None
    ) -> PromptBatch:
        """ValueError if a prompt is no text, a mixture has no weight, or the negative prompts are of another number."""
        if isinstance(prompt, Mapping):
            prompts = [_check_mixture(prompt)]
        elif isinstance(prompt, Sequence) and any(isinstance(one, Mapping) for one in prompt):
            check_prompts(["" if isinstance(one, Mapping) else one for one in prompt])
            prompts = [_check_mixture(one) if isinstance(one, Mapping) else one for one in prompt]
        else:
            prompts = check_prompts(prompt)
        if negative is not None:
            negative = check_prompts(negative)
            if len(negative) not in (1, len(prompts)):
                raise ValueError(
                    f"{len(negative)} negative prompts for {len(prompts)} prompts; expected one for each"
                )
            negative = negative * (len(prompts) if len(negative) == 1 else 1)
        return cls(prompts, negative)

    def check(self, options: UnCLIPOptions) -> None:
        """ValueError if nothing is guided and so nothing can be led away from the negative prompts."""
        stages = ("prior", "decoder") if options.embedding == "prior" else ("decoder",)
        if self.negative is not None and all(
            getattr(options, stage).guidance == 1 for stage in stages
        ):
            raise ValueError(
                f"negative_prompt takes the place of the null in guidance, but guidance is 1 in {' and '.join(stages)}"
                f"; set it higher in {' or '.join(stages)}"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> PromptBatch:
        return replace(
            self, prompts=self.prompts[rows], negative=self.negative and self.negative[rows]
        )

    @property
    def texts(self) -> list[str]:
        """The first text of each of the P prompts, then the second, ...: K * P of them."""
        return [
            text
            for of_all in zip(*(texts for texts, _ in self._mixtures()), strict=True)
            for text in of_all
        ]

    @property
    def weights(self) -> Tensor | None:
        """(K, P), each column of sum 1; None where each prompt is one text."""
        if all(isinstance(prompt, str) for prompt in self.prompts):
            return None
        return torch.tensor([weights for _, weights in self._mixtures()]).T.contiguous()

    def metadata(self) -> list[dict[str, Any]]:
        """What the metadata tells of each prompt."""
        negative = (
            [{}] * len(self)
            if self.negative is None
            else [{"negative_prompt": one} for one in self.negative]
        )
        return [
            {"prompt": prompt, **without}
            for prompt, without in zip(self.prompts, negative, strict=True)
        ]

    def _mixtures(self) -> list[tuple[list[str], list[float]]]:
        """Texts and weights of each prompt, as many as the longest mixture has."""
        mixtures = [{prompt: 1.0} if isinstance(prompt, str) else prompt for prompt in self.prompts]
        K = max(map(len, mixtures))
        return [
            (
                [*mixture, *[next(iter(mixture))] * (K - len(mixture))],
                [
                    *(weight / sum(mixture.values()) for weight in mixture.values()),
                    *[0.0] * (K - len(mixture)),
                ],
            )
            for mixture in mixtures
        ]


def describe_prompt(prompt: str | Mixture) -> str:
    """A mixture in one line."""
    return (
        prompt
        if isinstance(prompt, str)
        else " + ".join(f"{weight:g} {text}" for text, weight in prompt.items())
    )


def _check_mixture(mixture: Mixture) -> dict[str, float]:
    texts = check_prompts(list(mixture))
    weights = [mixture[text] for text in texts]
    if (
        not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights)
        or sum(weights) <= 0
    ):
        raise ValueError(
            f"weights of the mixture are {weights}; expected numbers with a sum above 0"
        )
    return {text: float(weight) for text, weight in mixture.items()}
