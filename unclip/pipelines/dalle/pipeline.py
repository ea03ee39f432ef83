"""Text or the beginning of a picture -> pictures, code by code (DALL-E, 2102.12092)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.checkpoints.formats import Bundle
from unclip.checkpoints.store import load_bundle, save_bundle
from unclip.clip import CLIP
from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.sampling import (
    CodeTransformer,
    OnCode,
    Step,
    guide,
    sample_code,
    sample_codes,
)
from unclip.pipelines.base import (
    Batch,
    ImageInput,
    about_drawing,
    check_prompts,
    in_batches,
    to_pil,
)
from unclip.pipelines.dalle.stages import DalleStages
from unclip.pipelines.provenance import encode_picture
from unclip.pipelines.rerank import best_of
from unclip.tokenizer import BPETokenizer
from unclip.types import CodeOptions, GenerationResult, OnStep, Progress, Prompt

# P prompts (or pictures, or both), n pictures of each, B batch (P * n), N = h * w codes, m first ones that are given,
# K codes of the codec

STAGE = "dalle"
KEEP = 0.4375  # of a picture's codes: 14 of 32 rows (2102.12092, figure 2)


@dataclass(frozen=True)
class Order:
    """What is asked for: P pictures, each to be drawn as often as the call says."""

    prompts: list[str | None]  # None says nothing
    told: list[dict[str, Any]]  # of the metadata
    codes: Tensor | None = None  # (P, m) codes that come first, or (P, N) to be drawn anew

    @classmethod
    def of_pictures(
        cls,
        operation: str,
        pictures: list[Image.Image],
        prompts: list[str | None],
        keep: float,
        codes: Tensor,
    ) -> Order:
        told = [
            {
                **({} if prompt is None else {"prompt": prompt}),
                "operation": operation,
                "picture": encode_picture(picture),
                "arguments": {"prompt": prompt, "keep": keep},
            }
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return cls(prompts, told, codes)


class DallePipeline(DalleStages):
    """The whole of it as one `TextToImage`; its stages stay callable alone.

    Each picture has a generator, which draws a number for each of the N codes, given ones included.
    """

    kind = "dalle"
    step: Step | None = None  # of the transformer, where it is compiled

    def __init__(
        self,
        tokenizer: BPETokenizer,
        codec: ImageCodec,
        dalle: CodeTransformer,
        clip: CLIP | None = None,
        options: CodeOptions | None = None,
        *,
        name: str = "unnamed",
        licence: str = "",
        source: str | None = None,
    ) -> None:
        """source: what `unclip.load` was given, for the pictures' metadata."""
        super().__init__(tokenizer, codec, dalle, clip)
        self.options = options or CodeOptions()
        self.name, self.licence, self.source = name, licence, source or name

    @classmethod
    def from_bundle(cls, bundle: Bundle, source: str | None = None) -> DallePipeline:
        """A pipeline of what a checkpoint holds."""
        if bundle.kind != cls.kind:
            raise ValueError(
                f"{bundle.name} is a model of kind {bundle.kind!r}; expected {cls.kind!r}"
            )
        parts, told = (
            bundle.components,
            {"name": bundle.name, "licence": bundle.licence, "source": source},
        )
        if missing := {"tokenizer", "codec", "dalle"} - parts.keys():
            raise ValueError(f"{bundle.name} has no {' and no '.join(sorted(missing))}")
        return cls(
            parts["tokenizer"],
            parts["codec"],
            parts["dalle"],
            parts.get("clip"),
            bundle.options,
            **told,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> DallePipeline:
        """A folder that `save_pretrained` wrote; `unclip.load` also knows names and Hub ids."""
        return cls.from_bundle(load_bundle(folder, dtype), source=str(folder)).to(device, dtype)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes a model folder, weights in `dtype` if given; the folder that was there is replaced only at the end."""
        self._check_whole()
        clip = {} if self.clip is None else {"clip": self.clip}
        parts = {**clip, "tokenizer": self.tokenizer, **self.networks()}
        save_bundle(
            Bundle(self.kind, parts, {}, self.options, self.name, self.licence), folder, dtype
        )

    def __call__(
        self,
        prompt: Prompt,
        *,
        num_images: int = 1,
        seed: int | None = None,
        options: CodeOptions | None = None,
        num_candidates: int | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Draws `num_images` pictures of each prompt; picture k has the seed `seed` + k (random if None).

        With num_candidates, so many are drawn of each, and those are kept that CLIP finds closest to the prompt, the
        best first: see their seeds and scores. on_step is called after every code of every batch of at most
        `batch_size` pictures, with a preview after every row of codes.
        """
        prompts = check_prompts(prompt)
        order = Order(prompts, [{"prompt": text} for text in prompts])
        return self._pictures(
            order, num_images, num_candidates, seed, options, on_step, batch_size, progress
        )

    def complete(
        self,
        image: ImageInput | Sequence[ImageInput],
        prompt: Prompt | None = None,
        *,
        keep: float = KEEP,
        num_images: int = 1,
        seed: int | None = None,
        options: CodeOptions | None = None,
        num_candidates: int | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Draws the rest of pictures, whose first `keep` * N codes stay exactly as they are.

        image: one or several of the size that the model draws. keep: a fraction in [0, 1). prompt: of all pictures, or
        one for each; None says nothing. All else as in a call.
        """
        pictures, prompts = self._matched(image, prompt)
        codes = self.encode(pictures).flatten(1)[:, : self._kept(keep)]
        order = Order.of_pictures("complete", pictures, prompts, keep, codes)
        return self._pictures(
            order, num_images, num_candidates, seed, options, on_step, batch_size, progress
        )

    def variations(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        *,
        image_emb: Tensor | None = None,
        prompt: Prompt | None = None,
        keep: float = KEEP,
        num_images: int = 1,
        seed: int | None = None,
        options: CodeOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Draws the lower part of pictures anew, as `complete` does; if `keep` is 0, every code of them.

        Then each code comes from what the picture's own codes before it lead the transformer to expect, and the
        options' temperature says how far a variation may go. prompt: their own caption, or None for none. image_emb is
        for other kinds of models.
        """
        if image is None or image_emb is not None:
            raise ValueError(f"{self.name} varies pictures, not CLIP embeddings; give it an image")
        pictures, prompts = self._matched(image, prompt)
        codes = self.encode(pictures).flatten(1)[:, : self._kept(keep) or None]
        order = Order.of_pictures("variations", pictures, prompts, keep, codes)
        return self._pictures(order, num_images, None, seed, options, on_step, batch_size, progress)

    def _pictures(
        self, order: Order, num_images: int, num_candidates: int | None, *drawing: Any
    ) -> GenerationResult:
        """All pictures of an order, or the best of the candidates for them."""
        if num_candidates is None:
            return GenerationResult.cat(list(self._draw(order, num_images, *drawing)))
        if None in order.prompts:
            raise ValueError("candidates are compared with the prompt, but there is none; give one")
        if self.clip is None:
            raise ValueError(
                f"{self.name} has no CLIP to choose the best candidates; leave num_candidates out"
            )
        clip = self.clip

        def look(images: Sequence[Image.Image]) -> Tensor:
            self._use(clip)
            return clip.encode_image(images)

        def read() -> Tensor:
            self._use(clip)
            return clip.encode_text(order.prompts).emb

        return best_of(
            lambda n: self._draw(order, n, *drawing), look, read, num_images, num_candidates
        )

    def _draw(
        self,
        order: Order,
        num_images: int,
        seed: int | None,
        options: CodeOptions | None,
        on_step: OnStep | None,
        batch_size: int,
        progress: bool,
    ) -> Iterator[GenerationResult]:
        """Batch after batch of an order."""
        options = options or self.options
        if not isinstance(options, CodeOptions):
            raise ValueError(
                f"options is a {type(options).__name__}; expected CodeOptions, such as pipe.options"
            )
        about = about_drawing(self, options)
        N, given = self.dalle.config.num_codes, 0 if order.codes is None else order.codes.shape[1]
        steps = N - given or 1
        prefix, prefix_of, null = None, None, None
        for batch in in_batches(
            len(order.prompts), num_images, seed, batch_size, steps, progress, on_step
        ):
            rows, n = batch.prompts, batch.num_images
            prompts = order.prompts[rows]
            codes = None if order.codes is None else order.codes[rows].repeat_interleave(n, dim=0)
            self._use(self.dalle)
            with torch.inference_mode():
                if given == N:
                    codes = self._anew(self._tokens(prompts), order.codes[rows], batch, options)
                else:
                    if prefix_of != rows:  # candidates of one prompt come in several batches
                        prefix, prefix_of = self.dalle.condition(self._tokens(prompts)), rows
                    if null is None and options.guidance != 1:
                        null = self.dalle.condition(self.dalle.null_tokens(1))
                    codes = sample_codes(
                        self.dalle,
                        prefix.repeat_interleave(n),
                        batch.generators,
                        options,
                        prime=codes,
                        null=null,
                        on_code=self._reporter(
                            batch, given, preview=on_step is not None and not self.offloaded
                        ),
                        compiled_step=self.step,
                    )
                images = self.decode(codes)
            if given == N:
                batch.on_step(Progress(STAGE, 1, 1, images))
            yield GenerationResult(
                to_pil(images),
                batch.seeds,
                [prompt for prompt in prompts for _ in range(n)],
                metadata=[
                    {**told, "seed": batch.seeds[k * n + i], **about}
                    for k, told in enumerate(order.told[rows])
                    for i in range(n)
                ],
                codes=codes.cpu().clone(),  # outside of inference mode: the caller may compute with them
            )

    def _anew(self, tokens: Tensor, codes: Tensor, batch: Batch, options: CodeOptions) -> Tensor:
        """Each of the codes (P, N) from what those before it lead to expect, n times: (P * n, h, w)."""
        logits = self.dalle(tokens, codes).codes  # P N K
        if options.guidance != 1:
            null = self.dalle(self.dalle.null_tokens(len(codes)), codes).codes
            logits = guide(torch.cat([logits, null]), options.guidance)
        drawn = [
            sample_code(
                logits[k // batch.num_images],
                torch.rand(codes.shape[1], generator=g).to(self.device),
                options,
            )
            for k, g in enumerate(batch.generators)
        ]
        return torch.stack(drawn).unflatten(1, self.dalle.config.grid)

    def _reporter(self, batch: Batch, given: int, preview: bool) -> OnCode:
        """Tells every code; a preview shows the rows of codes that are whole, and white below."""
        (h, w), size = self.dalle.config.grid, self.codec.image_size

        def report(n: int, codes: Tensor) -> None:
            seen = None
            if preview and n % w == 0:
                drawn = self.decode(codes.unflatten(1, (n // w, w)))
                seen = F.pad(drawn, (0, 0, 0, size - drawn.shape[2]), value=1.0)
            batch.on_step(Progress(STAGE, n - given, h * w - given, seen))

        return report

    def _kept(self, keep: float) -> int:
        """How many codes that is: at least one is drawn."""
        if not 0 <= keep < 1:
            raise ValueError(f"keep is {keep}; expected a fraction of the picture in [0, 1)")
        N = self.dalle.config.num_codes
        return min(round(keep * N), N - 1)

    def _matched(
        self, image: ImageInput | Sequence[ImageInput], prompt: Prompt | None
    ) -> tuple[list[Image.Image], list[str | None]]:
        """As many pictures as prompts."""
        pictures = self._fitting(image)
        prompts: list[str | None] = [None] if prompt is None else check_prompts(prompt)
        if len(pictures) == 1 or len(prompts) == 1:
            return pictures * len(prompts), prompts * len(pictures)
        if len(pictures) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts for {len(pictures)} pictures; expected one for each, or one"
            )
        return pictures, prompts
