"""The stages of unCLIP (2204.06125), each callable alone: text -> image embedding -> small picture -> large picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from unclip.diffusion.samplers import Denoise, Estimator, randn, sample, sampling_timesteps
from unclip.embeddings import normalise
from unclip.image_io import open_image
from unclip.models.layers import DenoiserCache, KeyValues
from unclip.models.unclip.decoder import Decoder, DecoderContext
from unclip.models.unclip.prior import DiffusionPrior, DirectPrior
from unclip.models.unclip.upsampler import Upsampler
from unclip.pipelines.base import (
    ImageInput,
    check_count,
    check_images,
    check_prompts,
    inferring,
    random_generators,
)
from unclip.pipelines.unclip.networks import UnCLIPNetworks
from unclip.types import OnStep, Progress, Prompt, StageOptions, TextEncoding

# P prompts, N images of each, C candidates, B batch (P * N), D embedding width, S image size


class UnCLIPStages(UnCLIPNetworks):
    """CLIP, a prior (or none, for variations only), a decoder and any number of upsamplers, ready to sample.

    `generators` are one for each picture. Through the stages each draws in this order: the prior's noise for candidate
    1, 2, ...; at every stochastic step of the prior, noise for candidate 1, 2, ...; then the decoder's first noise and
    its steps', and so through the upsamplers.
    """

    @inferring
    def encode_text(self, prompts: Prompt) -> TextEncoding:
        """P prompts -> TextEncoding in float32; a prompt longer than CLIP's context is cut with a warning."""
        self._use(self.clip)
        return self.clip.encode_text(check_prompts(prompts)).to(dtype=torch.float32)

    @inferring
    def encode_image(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Pictures (PIL, paths, or tensors in [-1, 1]) -> CLIP embeddings (N, D), not normalised."""
        self._use(self.clip)
        if isinstance(images, Tensor):
            return self.clip.encode_image(check_images(images)).float()
        several = (
            list(images)
            if isinstance(images, Sequence) and not isinstance(images, str)
            else [images]
        )
        if not several:
            raise ValueError("the list of images is empty; expected at least one picture")
        if any(isinstance(image, Tensor) for image in several):
            return torch.cat([self.encode_image(image) for image in several])
        return self.clip.encode_image([open_image(image) for image in several]).float()

    @inferring
    def sample_prior(
        self,
        text: TextEncoding,
        *,
        num_images: int = 1,
        generators: Sequence[torch.Generator] | None = None,
        options: StageOptions | None = None,
        candidates: int | None = None,
        on_step: OnStep | None = None,
        negative: TextEncoding | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """P texts -> CLIP image embeddings (P * N, D), N for each: the best of `candidates` by dot product with it.

        generators: one for each of the P * N embeddings. negative: 1 or P texts, in place of the null of guidance.
        weights (K, P): text holds the first of K texts for each of the P, then the second, ..., to be mixed so.
        """
        prior = self._need_prior()
        options = options or self.options.prior
        candidates = self.options.prior_candidates if candidates is None else candidates
        check_count("candidates", candidates)
        if options.temperature != 1 and not isinstance(prior, DirectPrior):
            raise ValueError(
                f"temperature is {options.temperature}, but a diffusion prior has none; leave it at 1"
            )
        K, P = (1, len(text)) if weights is None else weights.shape
        text_emb = mixed(text.emb.float(), weights)
        generators = generators or random_generators(P * num_images)
        each = num_images * candidates

        def prefix(text: TextEncoding) -> KeyValues:
            self._use(prior)
            return prior.condition(text)

        def null() -> KeyValues:
            if negative is not None:
                without = prefix(self._trimmed(negative))
                return without if len(without) == 1 else KeyValues.cat([without] * K)
            if prior.config.null_text == "learned":
                return self._keep("null prefix", [prior], lambda: prefix(prior.null_text(1)))
            return self._keep("null prefix", [self.clip, prior], lambda: prefix(self._no_text()))

        # A row of the prefix for each prompt, which serves all of its embeddings.
        cond = prefix(self._trimmed(text))
        drawing = [generator for generator in generators for _ in range(candidates)]
        mixing = None if weights is None else weights.repeat_interleave(each, dim=1)
        if isinstance(prior, DirectPrior):
            emb = self._sample_directly(prior, cond, null, drawing, options, on_step, mixing)
        else:
            denoise = self._guided("prior", prior, cond, null, options)
            x_0 = self._sample(
                "prior",
                self._estimator("prior", denoise, options, "x0", False, prior.x0_limit, mixing),
                (P * each, prior.config.emb_dim),
                drawing,
                options,
                on_step,
            )
            emb = prior.denormalize(x_0)
        emb = rearrange(emb, "(p n c) d -> p n c d", p=P, c=candidates)
        best = einsum(emb, text_emb, "p n c d, p d -> p n c").argmax(dim=-1)  # unCLIP 2.2
        return rearrange(emb.take_along_dim(best[..., None, None], dim=2), "p n 1 d -> (p n) d")

    @inferring
    def as_image(self, text_emb: Tensor) -> Tensor:
        """Text embeddings (N, D) at the usual length of image embeddings, to be decoded as such (unCLIP 5.1)."""
        return normalise(text_emb.float()) * self._need_prior().emb_norm

    @inferring
    def decode(
        self,
        image_emb: Tensor | None,
        text: TextEncoding | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
        options: StageOptions | None = None,
        on_step: OnStep | None = None,
        negative: TextEncoding | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """CLIP image embeddings (B, D), and their B texts or None for no text -> pictures (B, 3, s, s) in [-1, 1].

        Without embeddings (None) the decoder follows the texts alone (unCLIP 5.1).
        negative: B texts in place of the null of guidance. weights (K, B): text holds the first of K texts for each of
        the B, then the second, ..., to be mixed so.
        """
        decoder, config = self.decoder, self.decoder.config
        options = options or self.options.decoder
        K, blind = 1 if weights is None else len(weights), image_emb is None
        if blind:
            if text is None:
                raise ValueError(
                    "neither image_emb nor text is given; the decoder needs one of the two"
                )
            image_emb = text.emb.new_zeros(len(text) // K, config.emb_dim)  # gives way to the null
        elif image_emb.ndim != 2 or image_emb.shape[1] != config.emb_dim:
            raise ValueError(
                f"image_emb is of shape {tuple(image_emb.shape)}; expected (B, {config.emb_dim})"
            )
        B = len(image_emb)
        if text is not None and len(text) != K * B:
            raise ValueError(f"{len(text)} texts for {B} image embeddings; expected {K} for each")
        image_emb = image_emb.to(self.device, self.dtype).repeat(K, 1)

        def null() -> DecoderContext:
            if negative is not None:
                return DecoderContext.cat(
                    [self._context(image_emb[:B], negative, drop_image=True)] * K
                )
            return self._null_context(image_emb)

        denoise = self._guided(
            "decoder",
            decoder,
            self._context(image_emb, text, drop_image=blind),
            null,
            options,
        )
        return self._sample(
            "decoder",
            self._estimator(
                "decoder",
                denoise,
                options,
                config.prediction,
                config.learned_variance,
                1.0,
                weights,
            ),
            (B, 3, config.image_size, config.image_size),
            generators or random_generators(B),
            options,
            on_step,
        ).clamp(-1, 1)

    @inferring
    def upsample(
        self,
        images: Tensor,
        *,
        generators: Sequence[torch.Generator] | None = None,
        options: Sequence[StageOptions] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Pictures (B, 3, s, s) in [-1, 1] -> (B, 3, S, S), through one upsampler for each of `options`."""
        options = self.options.upsamplers if options is None else options
        generators = generators or random_generators(len(images))
        self._check_upsampling(options)
        size = self.decoder.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images are of shape {tuple(images.shape)}; expected (B, 3, {size}, {size})"
            )
        images = images.to(self.device)
        for i, (upsampler, stage_options) in enumerate(zip(self.upsamplers, options, strict=False)):
            config, low_res, stage = upsampler.config, upsampler.condition(images), f"upsampler_{i}"
            images = self._sample(
                stage,
                self._upsampling(stage, upsampler, low_res, stage_options),
                (len(images), 3, config.high_size, config.high_size),
                generators,
                stage_options,
                on_step,
            ).clamp(-1, 1)
        return images

    def _context(
        self,
        image_emb: Tensor,
        text: TextEncoding | None,
        drop_image: bool = False,
        known: Tensor | None = None,
    ) -> DecoderContext:
        """What the decoder is told; with known, what the inpainter is."""
        decoder = self.decoder if known is None else self.inpainter
        rows = torch.ones(len(image_emb), dtype=torch.bool, device=self.device)
        dropped = rows if drop_image else None
        if text is None:
            text = self._no_text().repeat_interleave(len(image_emb))
            drop_text = rows if decoder.config.null_text == "learned" else None
        else:
            text, drop_text = self._trimmed(text), None
        self._use(decoder)
        told = (
            {} if known is None else {"known": known}
        )  # to a decoder of another kind it would be unknown
        return decoder.condition(image_emb, text, drop_image=dropped, drop_text=drop_text, **told)

    def _null_context(self, image_emb: Tensor) -> DecoderContext:
        """Without image and text: one row; of image_emb only the width is used."""
        modules = [self.clip, self.decoder]
        return self._keep(
            "null context", modules, lambda: self._context(image_emb[:1], None, drop_image=True)
        )

    def _no_text(self) -> TextEncoding:
        return self._keep("empty prompt", [self.clip], lambda: self._trimmed(self.encode_text("")))

    def _trimmed(self, text: TextEncoding) -> TextEncoding:
        """As the networks want it, without the columns that are padding in every row."""
        text = text.to(self.device, self.dtype)
        return text if self.static_shapes else text.trim()

    def _guided(
        self,
        stage: str,
        network: nn.Module,
        cond: Any,
        null: Callable[[], Any],
        options: StageOptions,
    ) -> list[Denoise]:
        """The network under classifier-free guidance; at scale 1 the null is never computed."""
        if options.guidance == 1.0:
            return [self._denoiser(stage, network, cond, options)]
        without = null()
        both = type(cond).cat([cond, without.repeat_interleave(len(cond) // len(without))])
        return [self._denoiser(stage, network, context, options) for context in (cond, both)]

    def _estimator(
        self,
        stage: str,
        denoisers: list[Denoise],
        options: StageOptions,
        prediction: Any,
        learned_variance: bool,
        clip: float | None,
        weights: Tensor | None = None,
    ) -> Estimator:
        return Estimator(
            denoisers[0],
            self.schedules[stage],
            options,
            prediction,
            learned_variance,
            clip,
            denoisers[1] if len(denoisers) > 1 else None,
            weights,
            self.dtype,
        )

    def _upsampling(
        self, stage: str, upsampler: Upsampler, low_res: Tensor, options: StageOptions
    ) -> Estimator:
        first = self._denoiser(stage, upsampler, low_res, options)
        last = self._last_denoiser(stage, upsampler, low_res, options)
        end = sampling_timesteps(options, self.schedules[stage])[-1]

        def denoise(x_t: Tensor, t: float) -> Tensor:
            return (first if last is None or t != end else last)(x_t, t)

        config = upsampler.config
        return self._estimator(
            stage, [denoise], options, config.prediction, config.learned_variance, 1.0
        )

    def _denoiser(
        self, stage: str, network: Any, context: Any, options: StageOptions, last: bool = False
    ) -> Denoise:
        """The network of a stage under one context; last: the second one of an upsampler."""
        part, call = network, network.denoise_last if last else network.denoise
        if isinstance(network, Upsampler):
            part = network.last_unet if last else network.unet
        if options.cache_interval > 1 and not isinstance(network, Decoder | Upsampler):
            raise ValueError(
                f"{stage} is a {type(network).__name__}, which has no deep features to cache; set cache_interval to 1"
            )
        cache = DenoiserCache(sampling_timesteps(options, self.schedules[stage]), options.cache_interval)

        def denoise(x_t: Tensor, t: float) -> Tensor:
            self._use(part)
            return call(x_t, t, context, cache)

        return denoise

    def _last_denoiser(
        self, stage: str, upsampler: Upsampler, low_res: Tensor, options: StageOptions
    ) -> Denoise | None:
        """Of an upsampler with a network of its own for the last step."""
        if getattr(upsampler, "last_unet", None) is None:
            return None
        return self._denoiser(stage, upsampler, low_res, options, last=True)

    def _sample(
        self,
        stage: str,
        estimate: Estimator,
        shape: tuple[int, ...],
        generators: Sequence[torch.Generator],
        options: StageOptions,
        on_step: OnStep | None,
    ) -> Tensor:
        x_T = randn(shape, generators, self.device)  # in float32 whatever the networks have
        if x_T.ndim == 4:
            x_T = x_T.to(memory_format=torch.channels_last)

        def report(step: int, num_steps: int, x_0: Tensor) -> None:
            on_step(Progress(stage, step, num_steps, x_0 if x_0.ndim == 4 else None))

        schedule, report = self.schedules[stage], report if on_step else None
        with self._keeping():
            return sample(estimate, x_T, schedule, options, generators=generators, on_step=report)

    def _sample_directly(
        self,
        prior: DirectPrior,
        cond: KeyValues,
        null: Callable[[], KeyValues],
        generators: Sequence[torch.Generator],
        options: StageOptions,
        on_step: OnStep | None,
        weights: Tensor | None,
    ) -> Tensor:
        """Embeddings (B, D) without diffusion: guidance, and weights (K, B), act on what the prior predicts."""
        guided, rows = (
            options.guidance != 1.0,
            len(generators) * (1 if weights is None else len(weights)),
        )
        if guided:
            without = null()
            cond = KeyValues.cat([cond, without.repeat_interleave(len(cond) // len(without))])
            rows *= 2

        def combine(predicted: Tensor) -> Tensor:
            if guided:
                told, untold = predicted.chunk(2)
                predicted = torch.lerp(untold, told, options.guidance)
            if weights is None:
                return predicted
            return einsum(
                predicted.unflatten(0, weights.shape),
                weights.to(predicted),
                "k b ..., k b -> b ...",
            )

        def report(step: int) -> None:
            on_step(Progress("prior", step, prior.steps))

        self._use(prior)
        with self._keeping():
            told = {
                "temperature": options.temperature,
                "on_prediction": report if on_step else None,
            }
            return prior.sample(cond.expand(rows), generators, combine, **told)

    def prior_steps(self, options: StageOptions) -> int:
        """How often the prior will call `on_step`, of which only diffusion lets the options choose."""
        return self.prior.steps if isinstance(self.prior, DirectPrior) else options.steps

    def _need_prior(self) -> DiffusionPrior | DirectPrior:
        if self.prior is None:
            raise ValueError(
                "this model has no prior and cannot draw from text; use variations(image)"
            )
        return self.prior


def mixed(emb: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted sums (P, D) of K embeddings each, (K * P, D); weights (K, P), or None for a single one."""
    return (
        emb
        if weights is None
        else einsum(emb.unflatten(0, weights.shape), weights.to(emb), "k p d, k p -> p d")
    )
