"""Text, or a part of an image -> images, code by code (DALL-E, 2102.12092)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.checkpoints.formats import Bundle
from unclip.clip import CLIP
from unclip.diffusion.repaint import paste
from unclip.image_io import to_tensor
from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.bound import JointBound, joint_bound
from unclip.models.dalle.code_transformer import CodeTransformer, Prefix
from unclip.models.dalle.sampling import (
    OnCode,
    Step,
    guide,
    sample_code,
    sample_codes,
    sampled_span,
)
from unclip.models.dalle.transformer import DALLE
from unclip.pipelines.base import Pipeline, in_inference_mode
from unclip.pipelines.canvas import Canvas, Mask, View, marked_canvases, paint, views_to_model
from unclip.pipelines.provenance import encode_image, operation_metadata
from unclip.pipelines.request import (
    Batch,
    Images,
    PromptBatch,
    Request,
    Seed,
    batches_of,
    check_guided,
    check_options,
    check_prompts,
    open_images,
    prompt_for_each,
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
    canvases: Sequence[Canvas] = ()  # P images with a part to paint
    negative: list[str] | None = None  # P prompts that replace the null of guidance


@dataclass(frozen=True)
class Sampling:
    """How a call samples its batches."""

    options: CodeOptions
    K: int  # candidates for each image, of which the best is kept
    preview: bool
    prefixes: Prefixes


class Prefixes:
    """The prefixes of a task's prompts, and those of guidance, for one batch after the other.

    A prefix is computed once for consecutive batches of the same prompts.
    """

    def __init__(self, pipe: DallePipeline, task: Task, guided: bool) -> None:
        self.pipe, self.task, self.guided = pipe, task, guided
        self._rows: slice | None = None
        self._prefix: Any = None
        self._null: Any = None

    def of(self, rows: slice) -> tuple[Prefix, Prefix | None]:
        """Return the prefixes of the prompts in `rows`, and their nulls, one row or as many."""
        pipe, negative, new = self.pipe, self.task.negative, self._rows != rows
        pipe.runtime.use(pipe.dalle)
        if new:
            self._prefix = pipe.condition(self.task.prompts[rows])
            self._rows = rows
        if self.guided and negative is not None and new:
            self._null = pipe.condition(negative[rows])
        elif self.guided and self._null is None:
            self._null = pipe.dalle.condition(pipe.dalle.null_tokens(1))
        return self._prefix, self._null


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
        negative_prompt: Prompt | None = None,
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
        candidates, or those of one image. negative_prompt: one for all or one for each; it replaces
        the null of guidance. on_step is called after every code of a batch, with a preview after
        every row.
        """
        prompts = check_prompts(prompt)
        batch = PromptBatch.of(prompts, negative_prompt)
        task = Task([*prompts], batch.metadata(), negative=batch.negative)
        request = Request(num_images, seed, on_step, batch_size, progress, options)
        return self._run(task, request, num_candidates)

    def complete(
        self,
        image: Images,
        prompt: Prompt | None = None,
        *,
        negative_prompt: Prompt | None = None,
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
        texts = prompt, negative_prompt
        task = self._continue("complete", image, texts, keep, self._num_kept(keep))
        return self._run(task, request, num_candidates)

    def variations(
        self,
        image: Images | None = None,
        *,
        image_emb: Tensor | None = None,
        prompt: Prompt | None = None,
        negative_prompt: Prompt | None = None,
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
        texts = prompt, negative_prompt
        task = self._continue("variations", image, texts, keep, self._num_kept(keep) or None)
        return self._run(task, request)

    def inpaint(
        self,
        image: Images,
        mask: Mask | Sequence[Mask],
        prompt: Prompt | None = None,
        *,
        negative_prompt: Prompt | None = None,
        num_images: int = 1,
        seed: Seed = None,
        options: CodeOptions | None = None,
        num_candidates: int | None = None,
        on_step: OnStep | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> GenerationResult:
        """Paint the white part of a mask of the same size, or the transparent part if it has one.

        Codes whose pixels are all known are those of the image; the others are sampled from left to
        right and top to bottom, each given the codes before it. A code does not depend on what is
        known below it or to its right, so the painted part may not continue into it; several
        candidates, of which CLIP keeps the one closest to the prompt, help. Known pixels are kept
        bit for bit.

        Images may have any size; they are painted in square windows as wide as the shorter side.
        Candidates of `options.candidates` are compared in each window, known pixels included; those
        of `num_candidates` as whole images, resized to a square. Several images need a mask each.
        prompt: of the whole image, one for all images, one for each, or None. Warns if nothing or
        everything is marked. The other arguments are those of `__call__`.
        """
        request = Request(num_images, seed, on_step, batch_size, progress, options)
        canvases = marked_canvases(image, mask)
        prompts = prompt_for_each(prompt, len(canvases))
        negative = prompt_for_each(negative_prompt, len(canvases), "negative prompts")
        texts = [*(prompts or [None] * len(canvases))]
        metadata = operation_metadata([canvas.metadata for canvas in canvases], texts, negative)
        task = Task(texts, metadata, canvases=canvases, negative=negative)
        return self._run(task, request, num_candidates)

    @in_inference_mode
    def encode(self, images: Images) -> Tensor:
        """Encode P images of S x S pixels to codes (P, h, w)."""
        return self._encode(to_tensor(self._open(images)))

    def _encode(self, x: Tensor) -> Tensor:
        x = x.to(self.device)
        self.runtime.use(self.codec)
        return torch.cat([self.codec.encode(x[rows]) for rows in batches_of(len(x), CHUNK)])

    def condition(self, prompts: Sequence[str | None]) -> Prefix:
        """Compute what the transformer reads of P prompts; a missing one is treated as empty."""
        return self.dalle.condition(self._tokens(prompts))

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
        self,
        operation: str,
        image: Images,
        texts: tuple[Prompt | None, Prompt | None],
        keep: float,
        kept: int | None,
    ) -> Task:
        """Make the task for images whose first `kept` codes are given; None = all codes.

        texts: the prompts and the negative prompts.
        """
        images, prompts = self._pair(image, texts[0])
        negative = prompt_for_each(texts[1], len(images), "negative prompts")
        about = [{"operation": operation, "picture": encode_image(one)} for one in images]
        metadata = operation_metadata(about, prompts, negative, keep=keep)
        codes = self.encode(images).flatten(1)[:, :kept]
        return Task(prompts, metadata, codes, negative=negative)

    def _run(
        self, task: Task, request: Request, num_candidates: int | None = None
    ) -> GenerationResult:
        """Return all images of a task, or the best candidates."""
        options = request.options or self.options
        check_options(options, CodeOptions)
        if options.candidates > 1 and self.clip is None:
            fault = f"options.candidates is {options.candidates}"
            raise ValueError(f"{fault}; expected 1, because {self.name} has no CLIP")
        if task.negative is not None:
            check_guided({"options": options})
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
        """Return CLIP embeddings of whole images; CLIP alone would crop the ends of long ones."""
        assert self.clip is not None
        self.runtime.use(self.clip)
        if not isinstance(images, Tensor):
            square = (self.clip.image_size, self.clip.image_size)
            images = [one if one.width == one.height else one.resize(square) for one in images]
        return self.clip.encode_image(images)

    def _batches(
        self, task: Task, request: Request, options: CodeOptions
    ) -> Iterator[GenerationResult]:
        """Sample batch after batch of a task."""
        N, windows = self.dalle.config.num_codes, [len(one.windows) for one in task.canvases]
        given = 0 if task.codes is None else task.codes.shape[1]
        K = 1 if given == N or None in task.prompts else options.candidates
        steps = N * max(windows, default=1) - given or 1
        request = replace(request, batch_size=max(1, request.batch_size // K))
        preview = request.on_step is not None and not self.offloaded
        sampling = Sampling(options, K, preview, Prefixes(self, task, options.guidance != 1))
        for batch in request.batches(len(task.prompts), steps):
            rows, codes = batch.prompts, None
            with torch.inference_mode():
                images: Tensor | list[Image.Image]
                if task.canvases:
                    paint_window = partial(self._paint_window, batch=batch, sampling=sampling)
                    images = paint(task.canvases[rows], batch.num_images, paint_window)
                elif given == N:
                    codes = self._sample_again(task, batch, options)
                    images = self.decode(codes)
                    batch.on_step(Progress(STAGE, 1, 1, images))
                else:
                    known = torch.full((len(batch.seeds), N), -1)
                    if task.codes is not None:
                        prime = task.codes[rows].repeat_interleave(batch.num_images, dim=0)
                        known[:, :given] = prime
                    codes = self._sample(known, batch, sampling)
                    images, codes = self._keep_best(self.decode(codes), codes, batch, sampling)
            yield self.make_result(images, batch, task.metadata[rows], options, codes=codes)

    def _sample(
        self, known: Tensor, batch: Batch, sampling: Sampling, below: Tensor | None = None
    ) -> Tensor:
        """Sample K candidates of the codes (B, N) that are -1: (B * K, h, w).

        below: images (B, 3, S, S) that previews show below the rows of codes; None = white.
        """
        K, (prefix, null) = sampling.K, sampling.prefixes.of(batch.prompts)
        return sample_codes(
            self.dalle,
            prefix.repeat_interleave(batch.num_images * K),
            [generator for generator in batch.generators for _ in range(K)],
            sampling.options,
            known=known.repeat_interleave(K, dim=0),
            null=null,
            on_code=self._reporter(batch, sampling, sampled_span(known), below),
            compiled_step=self.step,
        )

    def _paint_window(self, views: Sequence[View], batch: Batch, sampling: Sampling) -> Tensor:
        """Paint the hole of one window of each canvas: (B, 3, S, S)."""
        size, K = self.codec.image_size, sampling.K
        image, hole = (x.to(self.device) for x in views_to_model(views, size))
        unknown = F.max_pool2d(hole.float(), self.codec.factor)[:, 0] > 0  # B h w
        known = self._encode(image).masked_fill(unknown, -1).flatten(1)  # B N
        codes = self._sample(known, batch, sampling, below=image)
        image, hole = (x.repeat_interleave(K, dim=0) for x in (image, hole))
        x = paste(self.decode(codes), image, hole)
        return self._keep_best(x, codes, batch, sampling)[0]

    def _sample_again(self, task: Task, batch: Batch, options: CodeOptions) -> Tensor:
        """Sample each of the codes (P, N), given those before it, n times: (P * n, h, w)."""
        assert task.codes is not None
        self.runtime.use(self.dalle)
        codes, negative = task.codes[batch.prompts], task.negative
        logits = self.dalle(self._tokens(task.prompts[batch.prompts]), codes).codes  # P N V
        if options.guidance != 1:
            tokens = self.dalle.null_tokens(len(codes))
            if negative is not None:
                tokens = self._tokens(negative[batch.prompts])
            null = self.dalle(tokens, codes).codes
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

    def _keep_best(
        self, images: Tensor, codes: Tensor, batch: Batch, sampling: Sampling
    ) -> tuple[Tensor, Tensor]:
        """Keep the best of the K candidates of each image, and its codes."""
        if sampling.K == 1:
            return images, codes
        prompts = sampling.prefixes.task.prompts[batch.prompts]
        best = self._best_candidates(images, prompts, batch.num_images)
        return images[best], codes[best]

    def _best_candidates(self, images: Tensor, prompts: Sequence[str | None], n: int) -> Tensor:
        """Return the rows (P * n,) of the best of K candidates; images: (P * n * K, 3, S, S)."""
        text_emb = self._encode_text(prompts)
        text_emb = text_emb.repeat_interleave(len(images) // len(prompts), dim=0)
        scores = torch.tensor(clip_scores(self._encode_images, images, text_emb))
        scores = scores.view(len(prompts) * n, -1)  # (P * n, K)
        return scores.argmax(dim=1) + torch.arange(0, scores.numel(), scores.shape[1])

    def _reporter(
        self, batch: Batch, sampling: Sampling, span: tuple[int, int], below: Tensor | None
    ) -> OnCode:
        """Report the codes of a span; previews show the complete rows of codes, and `below`.

        The preview shows the first of several candidates for an image.
        """
        (first, end), (_, w), K = span, self.dalle.config.grid, sampling.K
        size = self.codec.image_size

        def report(n: int, codes: Tensor) -> list[int]:
            def rows() -> Tensor:
                decoded = self.decode(codes[::K].unflatten(1, (n // w, w)))
                if below is not None:
                    return torch.cat([decoded, below[:, :, decoded.shape[2] :]], dim=2)
                return F.pad(decoded, (0, 0, 0, size - decoded.shape[2]), value=1.0)

            source = rows if sampling.preview and n % w == 0 else None
            batch.on_step(Progress(STAGE, n - first, end - first, source))
            return [i * K + k for i in batch.on_step.kept() for k in range(K)]

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
