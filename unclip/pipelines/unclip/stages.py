"""The stages of unCLIP (2204.06125): text -> image embedding -> small image -> large image."""

# P prompts, N images of each, C candidates, K texts in a mixture, B batch (P * N), D embedding
# width, s and S image sizes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from einops import einsum, rearrange
from torch import Tensor

from unclip.clip import CLIP
from unclip.diffusion.schedules import Schedule
from unclip.models.layers import DenoiserCache, KeyValues
from unclip.models.published.cross_attention_decoder import (
    CrossAttentionDecoder,
    CrossAttentionUpsampler,
    TokenContext,
)
from unclip.models.published.relative_prior import RelativePrior
from unclip.models.unclip.ar_prior import ARPrior
from unclip.models.unclip.decoder import Decoder, DecoderContext
from unclip.models.unclip.layout_prior import LayoutPrior
from unclip.models.unclip.one_shot_prior import OneShotPrior
from unclip.models.unclip.prior import DenoisingPrior, DirectPrior
from unclip.models.unclip.upsampler import Upsampler
from unclip.pipelines.diffusion_stage import BoundStage, DiffusionStage, Generators, with_null
from unclip.pipelines.request import (
    Images,
    PromptBatch,
    check_count,
    check_options,
    check_prompts,
    random_generators,
    warn_of_unknown,
)
from unclip.pipelines.runtime import Runtime
from unclip.types import (
    OnStep,
    Progress,
    Prompt,
    StageOptions,
    TextEncoding,
    UnCLIPOptions,
    mix_rows,
)

AnyPrior = DenoisingPrior | RelativePrior | ARPrior | OneShotPrior
AnyDecoder = Decoder | CrossAttentionDecoder
AnyUpsampler = Upsampler | CrossAttentionUpsampler


@dataclass(frozen=True)
class EncodedPrompts:
    """The texts that condition P samples; without any, the networks use their null."""

    # The first text of all P, then the second, ...: K * P texts
    text: TextEncoding | None = None
    negative: TextEncoding | None = None  # P texts, or 1 for all; replaces the null of guidance
    weights: Tensor | None = None  # (K, P), to mix the K texts of each sample; None: K = 1

    @classmethod
    def of(
        cls,
        encode_text: Callable[[Prompt], TextEncoding],
        prompts: list[str] | None,
        negative: list[str] | None = None,
    ) -> EncodedPrompts:
        """Encode P prompts and P negative prompts; each may be None."""
        text, other = (None if x is None else encode_text(x) for x in (prompts, negative))
        return cls(text, other)

    @property
    def K(self) -> int:
        """Number of texts of each sample."""
        return 1 if self.weights is None else len(self.weights)

    @property
    def emb(self) -> Tensor:
        """The embeddings of the texts, mixed by their weights, (P, D) float32."""
        assert self.text is not None
        return mix_rows(self.text.emb.float(), self.weights)

    def repeat_interleave(self, n: int) -> EncodedPrompts:
        """Repeat the texts of each sample n times: P -> P * n."""
        encodings = (self.text, self.negative)
        text, negative = (x if x is None else x.repeat_interleave(n) for x in encodings)
        weights = self.weights
        if weights is not None:
            weights = weights.repeat_interleave(n, dim=1)
        return EncodedPrompts(text, negative, weights)


class TextEncoder:
    """CLIP's text tower, and its encodings in the form that the networks take."""

    def __init__(self, clip: CLIP, runtime: Runtime) -> None:
        self.clip, self.runtime = clip, runtime

    def __call__(self, prompts: Prompt) -> TextEncoding:
        """Encode P prompts in float32; texts beyond CLIP's context are cut, with a warning."""
        prompts = check_prompts(prompts)
        warn_of_unknown(prompts, self.clip.tokenizer)
        self.runtime.use(self.clip)
        return self.clip.encode_text(prompts).to(dtype=torch.float32)

    def encode(self, prompts: PromptBatch) -> EncodedPrompts:
        """Encode P prompts or mixtures, and their negative prompts."""
        text = self(prompts.texts)
        negative = None if prompts.negative is None else self(prompts.negative)
        return EncodedPrompts(text, negative, prompts.weights)

    def empty(self) -> TextEncoding:
        """Return the encoding of the empty prompt, cached across calls."""
        return self.runtime.cached("empty prompt", [self.clip], lambda: self.prepare(self("")))

    def prepare(self, text: TextEncoding) -> TextEncoding:
        """Move a text to the device and dtype of the networks, and trim padding if possible."""
        text = text.to(self.runtime.device, self.runtime.dtype)
        return text if self.runtime.static_shapes else text.trim()


class PriorStage:
    """Samples CLIP image embeddings for texts, by diffusion or directly."""

    def __init__(
        self,
        network: AnyPrior,
        schedule: Schedule | None,
        text_encoder: TextEncoder,
        source: str | None = None,
    ) -> None:
        """schedule: of a diffusion prior. source: of a prior that is not the model's own."""
        self.network, self.text_encoder, self.source = network, text_encoder, source
        self.runtime, self.diffusion = text_encoder.runtime, None
        if not isinstance(network, DirectPrior):
            schedule = schedule or Schedule()
            self.diffusion = DiffusionStage("prior", network, schedule, self.runtime, "x0")

    def steps(self, options: StageOptions) -> int:
        """Return how often `on_step` is called; the options matter for diffusion only."""
        return self.network.steps if isinstance(self.network, DirectPrior) else options.steps

    def sample(
        self,
        prompts: EncodedPrompts,
        options: StageOptions,
        generators: Generators,
        *,
        num_images: int = 1,
        candidates: int = 1,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample image embeddings (P * N, D); see `UnCLIPPipeline.sample_prior`."""
        check_count("candidates", candidates)
        text, negative, weights = prompts.text, prompts.negative, prompts.weights
        assert text is not None
        P = len(text) // prompts.K
        if options.temperature != 1 and self.diffusion is not None:
            temperature = options.temperature
            raise ValueError(f"temperature is {temperature}; expected 1 for a diffusion prior")
        if negative is not None and len(negative) not in (1, P):
            raise ValueError(f"{len(negative)} negative texts for {P} texts; expected 1 or {P}")
        each = num_images * candidates
        mixing = None if weights is None else weights.repeat_interleave(each, dim=1)
        # One row of the context per prompt is shared by all of its embeddings.
        context = self._condition(self.text_encoder.prepare(text))
        null = partial(self._null, negative, prompts.K)
        generators = [generator for generator in generators for _ in range(candidates)]
        if isinstance(self.network, DirectPrior):
            emb = self._sample_direct(context, null, generators, options, on_step, mixing)
        else:
            assert self.diffusion is not None
            bound = self.diffusion.bind(context, options, null, mixing, self.network.x0_limit)
            x_T = bound.noise((P * each, self.network.config.emb_dim), generators)
            emb = self.network.denormalize(bound.sample(x_T, generators, on_step))
        # Keep the best candidate by dot product with the text embedding (unCLIP 2.2).
        emb = rearrange(emb, "(p n c) d -> p n c d", p=P, c=candidates)
        best = einsum(emb, prompts.emb, "p n c d, p d -> p n c").argmax(dim=-1)
        return rearrange(emb.take_along_dim(best[..., None, None], dim=2), "p n 1 d -> (p n) d")

    def _condition(self, text: TextEncoding) -> KeyValues:
        self.runtime.use(self.network)
        return self.network.condition(text)

    def _null(self, negative: TextEncoding | None, K: int) -> KeyValues:
        """Return the unconditional context: that of the negative texts, or one cached row."""
        if negative is not None:
            context = self._condition(self.text_encoder.prepare(negative))
            return context if len(context) == 1 else KeyValues.cat([context] * K)
        network, clip = self.network, self.text_encoder.clip
        learned = network.config.null_text == "learned"

        def condition() -> KeyValues:
            return self._condition(network.null_text(1) if learned else self.text_encoder.empty())

        return self.runtime.cached("prior null", [clip, network], condition)

    def _sample_direct(
        self,
        context: KeyValues,
        null: Callable[[], KeyValues],
        generators: Generators,
        options: StageOptions,
        on_step: OnStep | None,
        weights: Tensor | None,
    ) -> Tensor:
        """Sample (B, D) without diffusion; guidance and weights (K, B) act on the predictions."""
        network = self.network
        assert isinstance(network, DirectPrior)
        guided = options.guidance != 1
        rows = len(generators) * (1 if weights is None else len(weights))
        if guided:
            context, rows = with_null(context, null()), 2 * rows

        def combine(predicted: Tensor) -> Tensor:
            if guided:
                cond, uncond = predicted.chunk(2)
                predicted = torch.lerp(uncond, cond, options.guidance)
            return mix_rows(predicted, weights)

        def report(step: int) -> None:
            assert on_step is not None
            on_step(Progress("prior", step, network.steps))

        self.runtime.use(network)
        with self.runtime.memory():
            return network.sample(
                context.expand(rows),
                generators,
                combine,
                temperature=options.temperature,
                on_prediction=report if on_step else None,
            )


class LayoutStage:
    """Samples layouts, small blurred images that condition a decoder, by diffusion."""

    def __init__(self, network: LayoutPrior, schedule: Schedule, runtime: Runtime) -> None:
        self.network, self.runtime = network, runtime
        self.options = StageOptions(network.config.steps, network.config.guidance)
        self.diffusion = DiffusionStage("layout_prior", network, schedule, runtime, "x0")

    def sample(
        self,
        image_emb: Tensor,
        prompts: EncodedPrompts,
        generators: Generators,
        like: Tensor | None = None,
    ) -> Tensor:
        """Sample layouts (B, 3, h, h) in [-1, 1] for image embeddings (B, D) and texts.

        like: layouts that the samples should resemble; sampling starts from their noised versions
        (SDEdit, 2108.01073).
        """
        network, schedule = self.network, self.diffusion.schedule
        self.runtime.use(network)
        context = network.condition(image_emb, prompts.text, weights=prompts.weights)
        null = partial(network.condition, None, prompts.negative)
        bound = self.diffusion.bind(context, self.options, null, clip=network.config.x0_limit)
        x_T = bound.noise((len(image_emb), network.config.components), generators)
        if like is not None:
            start = network.config.variation * schedule.num_timesteps
            *_, last = bound.timesteps
            timesteps = [t for t in bound.timesteps if t < start] or [last]
            bound = replace(bound, timesteps=timesteps)
            x_0 = network.encode(like.to(self.runtime.device))
            t = torch.full((len(x_0),), round(timesteps[0]), device=x_0.device)
            x_T = schedule.add_noise(x_0, x_T, t)
        return network.decode(bound.sample(x_T, generators)).clamp(-1, 1)


class DecoderStage:
    """Samples small images for image embeddings and texts; as inpainter, around known pixels."""

    def __init__(
        self,
        name: str,
        network: AnyDecoder,
        schedule: Schedule,
        text_encoder: TextEncoder,
        layout_stage: LayoutStage | None = None,
    ) -> None:
        """layout_stage: samples the layouts; None = use the mean for an embedding."""
        self.network, self.text_encoder, self.layout_stage = network, text_encoder, layout_stage
        self.runtime, config = text_encoder.runtime, network.config
        self.diffusion = DiffusionStage(
            name,
            network,
            schedule,
            self.runtime,
            config.prediction,
            config.learned_variance,
            guided_variance=isinstance(network, CrossAttentionDecoder),
        )

    @property
    def size(self) -> int:
        """Side of the images, in pixels."""
        return self.network.config.image_size

    @property
    def inpaints(self) -> bool:
        """Whether the network was trained to inpaint."""
        return isinstance(self.network, Decoder) and self.network.config.inpaints

    def sample(
        self,
        image_emb: Tensor | None,
        prompts: EncodedPrompts,
        options: StageOptions,
        generators: Generators | None,
        *,
        on_step: OnStep | None = None,
        like: Tensor | None = None,
    ) -> Tensor:
        """Sample images (B, 3, s, s) in [-1, 1]; see `UnCLIPPipeline.decode`.

        like: layouts (B, 3, h, h) that the sampled ones should resemble.
        """
        B, layout = self._check(image_emb, prompts), None
        generators = generators or random_generators(B)
        if self.layout_stage is not None and image_emb is not None:
            layout = self.layout_stage.sample(image_emb, prompts, generators, like)
        bound = self.bind(image_emb, prompts, options, layout=layout)
        x_T = bound.noise((B, 3, self.size, self.size), generators)
        return bound.sample(x_T, generators, on_step).clamp(-1, 1)

    def bind(
        self,
        image_emb: Tensor | None,
        prompts: EncodedPrompts,
        options: StageOptions,
        *,
        known: Tensor | None = None,
        layout: Tensor | None = None,
    ) -> BoundStage:
        """Fix image embeddings (B, D), or None, and texts.

        known: see `masked_image`; not for mixtures. layout: (B, 3, h, h); None = the mean for each
        embedding.
        """
        B, K, blind = self._check(image_emb, prompts), prompts.K, image_emb is None
        if image_emb is None:
            image_emb = torch.zeros(B, self.network.config.emb_dim)  # replaced by the null
        image_emb = image_emb.to(self.runtime.device, self.runtime.dtype).repeat(K, 1)
        if layout is not None:
            layout = layout.repeat(K, 1, 1, 1)

        def null() -> Any:
            if prompts.negative is not None or known is not None:
                context: Any = self._condition(
                    image_emb[:B], prompts.negative, drop_image=True, known=known
                )
                return type(context).cat([context] * K)
            return self.runtime.cached(
                f"{self.diffusion.name} null",
                [self.text_encoder.clip, self.network],
                lambda: self._condition(image_emb[:1], None, drop_image=True),
            )

        context = self._condition(
            image_emb, prompts.text, drop_image=blind, known=known, layout=layout
        )
        return self.diffusion.bind(context, options, null, prompts.weights)

    def guide_embedding(self, image_emb: Tensor, known: Tensor, weight: float) -> Tensor:
        """Move embeddings (B, D) towards known pixels (B, 4, s, s), if the network has a layout."""
        layout = self.network.layout if isinstance(self.network, Decoder) else None
        if layout is None or not weight or not known[:, 3:].any():
            return image_emb
        self.runtime.use(self.network)
        return layout.guide_embedding(image_emb.to(self.runtime.device), known, weight)

    def _condition(
        self,
        image_emb: Tensor,
        text: TextEncoding | None,
        drop_image: bool = False,
        **inputs: Tensor | None,
    ) -> DecoderContext | TokenContext:
        everything = torch.ones(len(image_emb), dtype=torch.bool, device=self.runtime.device)
        drop_text = None
        if text is None:
            text = self.text_encoder.empty().repeat_interleave(len(image_emb))
            if self.network.config.null_text == "learned":
                drop_text = everything
        else:
            text = self.text_encoder.prepare(text)
        self.runtime.use(self.network)
        # Other kinds of decoders take neither known pixels nor a layout.
        extra = {name: value for name, value in inputs.items() if value is not None}
        return self.network.condition(
            image_emb, text, everything if drop_image else None, drop_text, **extra
        )

    def _check(self, image_emb: Tensor | None, prompts: EncodedPrompts) -> int:
        """Return the number of samples B. ValueError unless embeddings and texts are for B each."""
        text, K, width = prompts.text, prompts.K, self.network.config.emb_dim
        if image_emb is not None:
            if image_emb.ndim != 2 or image_emb.shape[1] != width:
                shape = tuple(image_emb.shape)
                raise ValueError(f"image_emb is of shape {shape}; expected (B, {width})")
            B = len(image_emb)
        elif text is not None:
            B = len(text) // K
        else:
            raise ValueError("image_emb and text are both None; expected at least one")
        if text is not None and len(text) != K * B:
            given = f"{len(text)} texts for {B} image embeddings"
            raise ValueError(f"{given}; expected {K} for each")
        if prompts.negative is not None and len(prompts.negative) != B:
            raise ValueError(f"{len(prompts.negative)} negative texts for {B} images; expected {B}")
        return B


class UpsamplerStage:
    """Samples large images from small ones."""

    def __init__(
        self, name: str, network: AnyUpsampler, schedule: Schedule, runtime: Runtime
    ) -> None:
        self.network, self.runtime, config = network, runtime, network.config
        self.diffusion = DiffusionStage(
            name, network, schedule, runtime, config.prediction, config.learned_variance
        )

    @property
    def size(self) -> int:
        """Side of the large images, in pixels."""
        return self.network.config.high_size

    @property
    def separate_last(self) -> bool:
        """Whether the last step has a U-Net of its own, trained for t = 0 only (Karlo)."""
        return isinstance(self.network, Upsampler) and self.network.last_unet is not None

    def sample(
        self,
        images: Tensor,
        options: StageOptions,
        generators: Generators,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample (B, 3, S, S) in [-1, 1] from images (B, 3, s, s) in [-1, 1]."""
        bound = self.bind(images, options)
        x_T = bound.noise((len(images), 3, self.size, self.size), generators)
        return bound.sample(x_T, generators, on_step).clamp(-1, 1)

    def bind(self, images: Tensor, options: StageOptions, end_at_0: bool = False) -> BoundStage:
        """Fix the small images. end_at_0: use timesteps that fit a separate last U-Net."""
        network = self.network
        context = network.condition(images.to(self.runtime.device))
        if not self.separate_last:
            return self.diffusion.bind(context, options)
        assert isinstance(network, Upsampler) and network.last_unet is not None
        spacing = replace(options, sampler="ancestral") if end_at_0 else options
        bound = self.diffusion.bind(context, spacing)
        denoise_first, last_t = bound.denoise.func, bound.timesteps[-1]
        denoise_last = self.runtime.bind(network.denoise_last, network.last_unet)

        def denoise(x_t: Tensor, t: float, context: Tensor, cache: DenoiserCache) -> Tensor:
            if t == last_t:  # once, without a cache
                return denoise_last(x_t, t, context)
            return denoise_first(x_t, t, context=context, cache=cache)

        return replace(bound, options=options, denoise=partial(denoise, **bound.denoise.keywords))


class StagedPipeline(Protocol):
    """The part of an `UnCLIPPipeline` that manipulations and editing use."""

    clip: CLIP
    options: UnCLIPOptions
    runtime: Runtime
    prior_stage: PriorStage | None
    decoder_stage: DecoderStage
    inpainter_stage: DecoderStage | None
    upsampler_stages: tuple[UpsamplerStage, ...]

    def encode_text(self, prompts: Prompt) -> TextEncoding: ...

    def encode_image(self, images: Images) -> Tensor: ...

    @property
    def sample_prior(self) -> Callable[..., Tensor]: ...

    def describe(self, options: UnCLIPOptions) -> dict[str, Any]: ...


def stage_sizes(pipe: StagedPipeline, options: UnCLIPOptions) -> list[int]:
    """Return the sides of the images of the decoder and of each upsampler that is used."""
    used = pipe.upsampler_stages[: len(options.upsamplers)]
    return [pipe.decoder_stage.size, *(stage.size for stage in used)]


def bind_stage(
    pipe: StagedPipeline, i: int, options: UnCLIPOptions, image_emb: Tensor, x: Tensor | None
) -> BoundStage:
    """Bind the decoder (i = 0) to embeddings (B, D), or an upsampler to small images x."""
    if i == 0:
        return pipe.decoder_stage.bind(image_emb, EncodedPrompts(), options.decoder)
    assert x is not None
    return pipe.upsampler_stages[i - 1].bind(x, options.upsamplers[i - 1], end_at_0=True)


def check_stages(pipe: StagedPipeline, options: Any, of_prompts: bool = False) -> None:
    """Raise ValueError unless `options` are valid; of_prompts: for images of prompts alone."""
    check_options(options, UnCLIPOptions, len(pipe.upsampler_stages))
    if options.embedding != "prior" and not of_prompts:
        needed = "painting, variations, inversion and interpolation need 'prior'"
        raise ValueError(f"embedding is {options.embedding!r}; {needed}")
