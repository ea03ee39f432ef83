"""Text, or the beginning of an image -> images, code by code (DALL-E, 2102.12092)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.checkpoints.formats import Bundle
from unclip.clip import CLIP
from unclip.image_io import to_tensor
from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.bound import JointBound, joint_bound
from unclip.models.dalle.sampling import (
    CodeTransformer,
    OnCode,
    Step,
    guide,
    sample_code,
    sample_codes,
)
from unclip.models.dalle.transformer import DALLE
from unclip.pipelines.base import Pipeline, in_inference_mode
from unclip.pipelines.provenance import encode_image
from unclip.pipelines.request import (
    Batch,
    Images,
    Request,
    Seed,
    batches_of,
    check_options,
    check_prompts,
    open_images,
    seeds_from,
    warn_of_unknown,
)
from unclip.pipelines.rerank import BestOf, check_candidates, clip_scores
from unclip.pipelines.runtime import Runtime
from unclip.tokenizer import BPETokenizer
from unclip.types import CodeOptions, GenerationResult, OnStep, Progress, Prompt

# P prompts or images, n images of each, K candidates for each of these, B batch (P * n), L text
# tokens, N = h * w codes, V values of a code, S image size, D CLIP embedding width

STAGE = "dalle"
KEEP = 0.4375  # default fraction of the codes to keep: 14 of 32 rows (2102.12092, figure 2)
CHUNK = 16  # images that the codec encodes together


@dataclass(frozen=True)
class Task:
    """P inputs of a call, each of which gives `num_images` images."""

    prompts: list[str | None]  # None for no prompt
    metadata: list[dict[str, Any]]
    codes: Tensor | None = None  # the first codes (P, m), or all (P, N) to be sampled again


class DallePipeline(Pipeline):
    """A tokenizer, a transformer over codes, an image codec, and optionally a CLIP that reranks.

    Each image has a generator that is used once for each of the N codes, given ones included, of
    each candidate.
    """

    kind = "dalle"
    required = ("tokenizer", "codec", "dalle")
    options: CodeOptions

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
        self.tokenizer, self.codec, self.dalle, self.clip = tokenizer, codec, dalle, clip
        self.options = options or CodeOptions()
        self.step: Step | None = None  # of the transformer, if it is compiled
        self._check_compatible()
        networks = {"clip": clip, "codec": codec, "dalle": dalle}
        present = {key: network for key, network in networks.items() if network is not None}
        super().__init__(Runtime(present), name, licence, source)

    @classmethod
    def from_bundle(cls, bundle: Bundle, source: str | None = None) -> DallePipeline:
        """Make a pipeline from the components of a checkpoint."""
        cls.check_bundle(bundle)
        parts = bundle.components
        return cls(
            parts["tokenizer"],
            parts["codec"],
            parts["dalle"],
            parts.get("clip"),
            bundle.options,
            name=bundle.name,
            licence=bundle.licence,
            source=source,
        )

    def components(self) -> dict[str, Any]:
        """Return the parts of a checkpoint by name."""
        clip = {} if self.clip is None else {"clip": self.clip}
        return {**clip, "tokenizer": self.tokenizer, **self.networks()}

    def __call__(
        self,
        prompt: Prompt,
        *,
        num_images: int = 1,
        seed: Seed = None,
        options: CodeOptions | None = None,
        num_candidates: int | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Generate `num_images` images of each prompt; image k has the seed `seed` + k.

        With num_candidates, that number of images is sampled for each prompt, and those that CLIP
        finds closest to the prompt are kept, the best first, with their scores. It replaces
        `options.candidates`, the number for each image. A batch has at most `batch_size`
        candidates, or those of one image. on_step is called after every code of a batch, with a
        preview after every row.
        """
        prompts = check_prompts(prompt)
        task = Task([*prompts], [{"prompt": text} for text in prompts])
        request = Request(num_images, seed, on_step, batch_size, progress, options)
        return self._run(task, request, num_candidates)

    def complete(
        self,
        image: Images,
        prompt: Prompt | None = None,
        *,
        keep: float = KEEP,
        num_images: int = 1,
        seed: Seed = None,
        options: CodeOptions | None = None,
        num_candidates: int | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Complete images: keep the first `keep` * N codes of each, and sample the others.

        image: one or several of the model's size. keep: a fraction in [0, 1). prompt: one for all
        images, one for each, or None. The other arguments are those of `__call__`.
        """
        request = Request(num_images, seed, on_step, batch_size, progress, options)
        task = self._continue("complete", image, prompt, keep, self._num_kept(keep))
        return self._run(task, request, num_candidates)

    def variations(
        self,
        image: Images | None = None,
        *,
        image_emb: Tensor | None = None,
        prompt: Prompt | None = None,
        keep: float = KEEP,
        num_images: int = 1,
        seed: Seed = None,
        options: CodeOptions | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Sample the lower part of images again, as `complete` does; with keep 0, every code.

        At keep 0 each code is sampled given the image's own codes before it, and the temperature of
        the options determines how much a variation may differ. prompt: the captions, or None.
        image_emb is not supported by this kind of model.
        """
        if image is None or image_emb is not None:
            raise ValueError(f"{self.name} varies images, not CLIP embeddings; give it an image")
        request = Request(num_images, seed, on_step, batch_size, progress, options)
        task = self._continue("variations", image, prompt, keep, self._num_kept(keep) or None)
        return self._run(task, request)

    @in_inference_mode
    def encode(self, images: Images) -> Tensor:
        """Encode P images of S x S pixels to codes (P, h, w)."""
        x = to_tensor(self._open(images)).to(self.device)
        self.runtime.use(self.codec)
        return torch.cat([self.codec.encode(x[rows]) for rows in batches_of(len(x), CHUNK)])

    @in_inference_mode
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes (B, h, w) to images (B, 3, S, S) in [-1, 1]."""
        self.runtime.use(self.codec)
        return self.codec.decode(codes.to(self.device)).float()

    def elbo(self, images: Images, captions: Prompt, *, seed: int | None = None) -> JointBound:
        """Estimate the lower bound on ln p(x, y) of images and captions, with one sample of codes.

        `JointBound.bits_per_dim` is an upper bound on the bits per pixel value, caption included.
        """
        if self.offloaded:
            raise ValueError("the networks are offloaded; compute the bound before offload()")
        dalle = self.dalle
        if not isinstance(dalle, DALLE):
            raise ValueError(f"{self.name} is a {type(dalle).__name__}; elbo needs a joint model")
        opened, captions = self._open(images), check_prompts(captions)
        if len(opened) != len(captions):
            given = f"{len(captions)} captions for {len(opened)} images"
            raise ValueError(f"{given}; expected one for each")
        generator = torch.Generator(self.device).manual_seed(seeds_from(seed, 1)[0])
        x, tokens = to_tensor(opened).to(self.device), self._tokens(captions)
        bounds = [
            joint_bound(dalle, self.codec, x[rows], tokens[rows], generator)
            for rows in batches_of(len(x), CHUNK)
        ]
        return JointBound.cat(bounds)

    def _continue(
        self, operation: str, image: Images, prompt: Prompt | None, keep: float, kept: int | None
    ) -> Task:
        """Make the task for images whose first `kept` codes are given; None = all codes."""
        images, prompts = self._pair(image, prompt)
        metadata = [
            {
                **({} if text is None else {"prompt": text}),
                "operation": operation,
                "picture": encode_image(one),
                "arguments": {"prompt": text, "keep": keep},
            }
            for one, text in zip(images, prompts, strict=True)
        ]
        return Task(prompts, metadata, self.encode(images).flatten(1)[:, :kept])

    def _run(
        self, task: Task, request: Request, num_candidates: int | None = None
    ) -> GenerationResult:
        """Return all images of a task, or the best candidates."""
        options = request.options or self.options
        check_options(options, CodeOptions)
        if options.candidates > 1 and self.clip is None:
            fault = f"options.candidates is {options.candidates}"
            raise ValueError(f"{fault}; expected 1, because {self.name} has no CLIP")
        if num_candidates is None:
            return GenerationResult.cat(list(self._batches(task, request, options)))
        check_candidates(request.num_images, num_candidates)
        if None in task.prompts:
            raise ValueError("candidates are compared with the prompt, but there is none; give one")
        if self.clip is None:
            raise ValueError(f"{self.name} has no CLIP to compare candidates; omit num_candidates")
        text_emb = self._encode_text(task.prompts)
        best = BestOf(self._encode_images, text_emb, request.num_images, num_candidates)
        request = replace(request, num_images=num_candidates)
        for result in self._batches(task, request, replace(options, candidates=1)):
            best.add(result)
        return best.result()

    @torch.inference_mode()
    def _encode_text(self, prompts: Sequence[str | None]) -> Tensor:
        """Return the CLIP embeddings (P, D) of prompts."""
        assert self.clip is not None
        self.runtime.use(self.clip)
        return self.clip.encode_text([prompt or "" for prompt in prompts]).emb

    def _encode_images(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        assert self.clip is not None
        self.runtime.use(self.clip)
        return self.clip.encode_image(images)

    def _batches(
        self, task: Task, request: Request, options: CodeOptions
    ) -> Iterator[GenerationResult]:
        """Sample batch after batch of a task."""
        dalle, N = self.dalle, self.dalle.config.num_codes
        given = 0 if task.codes is None else task.codes.shape[1]
        steps = N - given or 1
        prefix, prefix_of, null = None, None, None
        K = 1 if given == N or None in task.prompts else options.candidates
        request = replace(request, batch_size=max(1, request.batch_size // K))
        for batch in request.batches(len(task.prompts), steps):
            rows, n = batch.prompts, batch.num_images
            prompts = task.prompts[rows]
            self.runtime.use(dalle)
            with torch.inference_mode():
                if task.codes is not None and given == N:
                    tokens = self._tokens(prompts)
                    codes = self._sample_again(tokens, task.codes[rows], batch, options)
                else:
                    if prefix is None or prefix_of != rows:  # shared by the batches of one prompt
                        prefix, prefix_of = dalle.condition(self._tokens(prompts)), rows
                    if null is None and options.guidance != 1:
                        null = dalle.condition(dalle.null_tokens(1))
                    prime = task.codes
                    if prime is not None:
                        prime = prime[rows].repeat_interleave(n * K, dim=0)
                    preview = request.on_step is not None and not self.offloaded
                    codes = sample_codes(
                        dalle,
                        prefix.repeat_interleave(n * K),
                        [generator for generator in batch.generators for _ in range(K)],
                        options,
                        prime=prime,
                        null=null,
                        on_code=self._reporter(batch, given, preview, K),
                        compiled_step=self.step,
                    )
                images = self.decode(codes)
                if K > 1:
                    best = self._best_candidates(images, prompts, n)
                    images, codes = images[best], codes[best]
            if given == N:
                batch.on_step(Progress(STAGE, 1, 1, images))
            yield self.make_result(images, batch, task.metadata[rows], options, codes=codes)

    def _sample_again(
        self, tokens: Tensor, codes: Tensor, batch: Batch, options: CodeOptions
    ) -> Tensor:
        """Sample each of the codes (P, N), given those before it, n times: (P * n, h, w)."""
        logits = self.dalle(tokens, codes).codes  # P N V
        if options.guidance != 1:
            null = self.dalle(self.dalle.null_tokens(len(codes)), codes).codes
            logits = guide(torch.cat([logits, null]), options.guidance)
        samples = [
            sample_code(
                logits[k // batch.num_images],
                torch.rand(codes.shape[1], generator=generator).to(self.device),
                options,
            )
            for k, generator in enumerate(batch.generators)
        ]
        return torch.stack(samples).unflatten(1, self.dalle.config.grid)

    def _best_candidates(self, images: Tensor, prompts: Sequence[str | None], n: int) -> Tensor:
        """Return the rows (P * n,) of the best of K candidates; images: (P * n * K, 3, S, S)."""
        text_emb = self._encode_text(prompts)
        text_emb = text_emb.repeat_interleave(len(images) // len(prompts), dim=0)
        scores = torch.tensor(clip_scores(self._encode_images, images, text_emb))
        scores = scores.view(len(prompts) * n, -1)  # (P * n, K)
        return scores.argmax(dim=1) + torch.arange(0, scores.numel(), scores.shape[1])

    def _reporter(self, batch: Batch, given: int, preview: bool, candidates: int) -> OnCode:
        """Report every code; previews show the complete rows of codes, and white below.

        The preview shows the first of several candidates for an image.
        """
        (h, w), size = self.dalle.config.grid, self.codec.image_size

        def report(n: int, codes: Tensor) -> list[int]:
            def rows() -> Tensor:
                decoded = self.decode(codes[::candidates].unflatten(1, (n // w, w)))
                return F.pad(decoded, (0, 0, 0, size - decoded.shape[2]), value=1.0)

            source = rows if preview and n % w == 0 else None
            batch.on_step(Progress(STAGE, n - given, h * w - given, source))
            kept = batch.on_step.kept()
            return [i * candidates + k for i in kept for k in range(candidates)]

        return report

    def _num_kept(self, keep: float) -> int:
        """Return how many codes to keep; at least one is sampled."""
        if not 0 <= keep < 1:
            raise ValueError(f"keep is {keep}; expected a fraction of the image in [0, 1)")
        N = self.dalle.config.num_codes
        return min(round(keep * N), N - 1)

    def _pair(
        self, image: Images, prompt: Prompt | None
    ) -> tuple[list[Image.Image], list[str | None]]:
        """Return equally many images and prompts; a single one is repeated."""
        images = self._open(image)
        prompts: list[str | None] = [None] if prompt is None else [*check_prompts(prompt)]
        if len(images) == 1 or len(prompts) == 1:
            return images * len(prompts), prompts * len(images)
        if len(images) != len(prompts):
            given = f"{len(prompts)} prompts for {len(images)} images"
            raise ValueError(f"{given}; expected one for each, or one")
        return images, prompts

    def _tokens(self, prompts: Sequence[str | None]) -> Tensor:
        """Return token ids (P, L); a missing prompt is treated as the empty one."""
        texts = [prompt or "" for prompt in prompts]
        warn_of_unknown(texts, self.tokenizer)
        return self.dalle.tokens(*self.tokenizer(texts))

    def _open(self, images: Images) -> list[Image.Image]:
        """Open images. ValueError unless they have the size of the codec."""
        opened, size = open_images(images), self.codec.image_size
        for image in opened:
            if image.size != (size, size):
                given, expected = "{} x {} px".format(*image.size), f"{size} x {size} px"
                raise ValueError(f"the image is {given}; expected {expected} (command line: --fit)")
        return opened

    def _check_compatible(self) -> None:
        """Raise ValueError for components that were not trained for each other."""
        if not isinstance(self.codec, ImageCodec):
            kind = type(self.codec).__name__
            raise ValueError(f"codec is a {kind}; expected an image codec, such as a DVAE")
        config, tokenizer = self.dalle.config, self.tokenizer
        config.check_codec(self.codec.vocab_size, self.codec.grid)
        length, vocab = tokenizer.context_length, tokenizer.vocab_size
        if vocab > config.text_vocab or length != config.context_length:
            expected = f"{config.context_length} of {config.text_vocab}"
            raise ValueError(f"the tokenizer gives {length} of {vocab} tokens; expected {expected}")
