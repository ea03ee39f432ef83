"""The stages of unCLIP (2204.06125), each callable alone: text -> image embedding -> small picture -> large picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from unclip.clip import CLIP
from unclip.diffusion.guidance import Denoise, classifier_free
from unclip.diffusion.samplers import randn, sample
from unclip.diffusion.schedules import Schedule, ScheduleConfig
from unclip.models.decoder import Decoder, DecoderContext
from unclip.models.prior import DiffusionPrior, TextPrefix
from unclip.models.upsampler import Upsampler
from unclip.pictures import open_picture
from unclip.pipelines.base import Picture, check_prompts, random_generators
from unclip.types import OnStep, Progress, Prompt, StageOptions, TextEncoding, UnCLIPOptions

if TYPE_CHECKING:
    from typing_extensions import Self

# P prompts, N images of each, C candidates, B batch (P * N), D embedding width, S image size

PRIOR_CLIP = 5.0  # bound of normalised embeddings, in standard deviations (Karlo)
SMALL_CLIP = 200_000_000  # parameters up to which CLIP stays in float32: it runs once a call


class UnCLIPStages:
    """CLIP, a prior (or none, for variations only), a decoder and any number of upsamplers, ready to sample.

    `generators` are one for each picture. Through the stages each draws in this order: the prior's noise for candidate
    1, 2, ...; at every stochastic step of the prior, noise for candidate 1, 2, ...; then the decoder's first noise and
    its steps', and so through the upsamplers.
    """

    def __init__(
        self,
        clip: CLIP,
        prior: DiffusionPrior | None,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler] = (),
        options: UnCLIPOptions | None = None,
        *,
        schedules: Mapping[str, ScheduleConfig] | None = None,
    ) -> None:
        """schedules: of "prior", "decoder", "upsampler_0", ...; cosine for those left out."""
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, tuple(upsamplers)
        self.options = options or UnCLIPOptions(upsamplers=(StageOptions(steps=7),) * len(self.upsamplers))
        schedules = dict(schedules or {})
        self.schedules = {stage: Schedule(schedules.pop(stage, ScheduleConfig())) for stage in self.networks()}
        if schedules:
            raise ValueError(f"schedules of {', '.join(schedules)}; the model has {', '.join(self.schedules)}")
        self._check_fit()
        for module in (clip, *self.networks().values()):
            module.eval().requires_grad_(False)
        for network in (decoder, *self.upsamplers):
            network.to(memory_format=torch.channels_last)

    def networks(self) -> dict[str, nn.Module]:
        """Every network but CLIP, under the name of its stage."""
        prior = {} if self.prior is None else {"prior": self.prior}
        return {**prior, "decoder": self.decoder, **{f"upsampler_{i}": up for i, up in enumerate(self.upsamplers)}}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves all networks; parameters become `dtype`, but a small CLIP and the prior's statistics stay float32."""
        big = sum(p.numel() for p in self.clip.parameters()) > SMALL_CLIP
        self.clip.to(device=device, dtype=dtype if big else None)
        for network in self.networks().values():
            network.to(device=device)
            for parameter in network.parameters():
                parameter.data = parameter.data.to(dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    @torch.inference_mode()
    def encode_text(self, prompts: Prompt) -> TextEncoding:
        """P prompts -> TextEncoding in float32; a prompt longer than CLIP's context is cut with a warning."""
        return self.clip.encode_text(check_prompts(prompts)).to(dtype=torch.float32)

    @torch.inference_mode()
    def encode_image(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Pictures (PIL, paths, or tensors in [-1, 1]) -> CLIP embeddings (N, D), not normalised."""
        if isinstance(images, Tensor):
            if images.ndim not in (3, 4) or images.shape[-3] != 3:
                raise ValueError(f"image is of shape {tuple(images.shape)}; expected (3, H, W) or (B, 3, H, W)")
            return self.clip.encode_image(images if images.ndim == 4 else images[None]).float()
        several = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        if not several:
            raise ValueError("the list of images is empty; expected at least one picture")
        if any(isinstance(image, Tensor) for image in several):
            return torch.cat([self.encode_image(image) for image in several])
        return self.clip.encode_image([open_picture(image) for image in several]).float()

    @torch.inference_mode()
    def sample_prior(
        self,
        text: TextEncoding,
        *,
        num_images: int = 1,
        generators: Sequence[torch.Generator] | None = None,
        options: StageOptions | None = None,
        candidates: int | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """P texts -> CLIP image embeddings (P * N, D), N for each: the best of `candidates` by dot product with it.

        generators: one for each of the P * N embeddings.
        """
        prior = self._need_prior()
        options, candidates = options or self.options.prior, candidates or self.options.prior_candidates
        generators = generators or random_generators(len(text) * num_images)
        batch = len(text) * num_images * candidates

        def null() -> TextPrefix:
            learned = prior.config.null_text == "learned"
            return prior.condition(prior.null_text(1) if learned else self._no_text())

        prefix = prior.condition(text.to(self.device, self.dtype))  # once for each prompt
        prefix = prefix.repeat_interleave(num_images * candidates)
        x_0 = self._sample(
            "prior",
            self._guided("prior", prior.denoise, prefix, null, options),
            (batch, prior.config.emb_dim),
            [generator for generator in generators for _ in range(candidates)],
            options,
            on_step,
            prediction="x0",
            clip=PRIOR_CLIP,
        )
        emb = rearrange(prior.denormalize(x_0), "(p n c) d -> p n c d", p=len(text), c=candidates)
        best = einsum(emb, text.emb.float(), "p n c d, p d -> p n c").argmax(dim=-1)  # unCLIP 2.2
        return rearrange(emb.take_along_dim(best[..., None, None], dim=2), "p n 1 d -> (p n) d")

    @torch.inference_mode()
    def decode(
        self,
        image_emb: Tensor,
        text: TextEncoding | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
        options: StageOptions | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """CLIP image embeddings (B, D), and their B texts or None for no text -> pictures (B, 3, s, s) in [-1, 1]."""
        decoder, config = self.decoder, self.decoder.config
        options = options or self.options.decoder
        if text is not None and len(text) != len(image_emb):
            raise ValueError(f"{len(text)} texts for {len(image_emb)} image embeddings; expected one for each")
        image_emb = image_emb.to(self.device, self.dtype)

        def null() -> DecoderContext:
            return self._context(image_emb[:1], None, drop_image=True)

        denoise = self._guided(
            "decoder", decoder.denoise, self._context(image_emb, text), null, options, config.learned_variance
        )
        return self._sample(
            "decoder",
            denoise,
            (len(image_emb), 3, config.image_size, config.image_size),
            generators or random_generators(len(image_emb)),
            options,
            on_step,
            prediction=config.prediction,
            learned_variance=config.learned_variance,
            clip=1.0,
        ).clamp(-1, 1)

    @torch.inference_mode()
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
            raise ValueError(f"images are of shape {tuple(images.shape)}; expected (B, 3, {size}, {size})")
        images = images.to(self.device)
        for i, (upsampler, stage_options) in enumerate(zip(self.upsamplers, options, strict=False)):
            config, low_res = upsampler.config, upsampler.prepare(images)

            def denoise(x_t: Tensor, t: Tensor, last: bool = False, upsampler=upsampler, low_res=low_res) -> Tensor:
                return upsampler.denoise(x_t.to(self.dtype), t, low_res, last)

            images = self._sample(
                f"upsampler_{i}",
                denoise,
                (len(images), 3, config.high_size, config.high_size),
                generators,
                stage_options,
                on_step,
                prediction=config.prediction,
                learned_variance=config.learned_variance,
                clip=1.0,
                denoise_last=partial(denoise, last=True),
            ).clamp(-1, 1)
        return images

    def _context(self, image_emb: Tensor, text: TextEncoding | None, drop_image: bool = False) -> DecoderContext:
        rows = torch.ones(len(image_emb), dtype=torch.bool, device=self.device)
        if text is not None:
            return self.decoder.condition(image_emb, text.to(self.device, self.dtype))
        return self.decoder.condition(
            image_emb,
            self._no_text().repeat_interleave(len(image_emb)),
            drop_image=rows if drop_image else None,
            drop_text=rows if self.decoder.config.null_text == "learned" else None,
        )

    def _no_text(self) -> TextEncoding:
        return self.encode_text("").to(self.device, self.dtype)

    def _guided(
        self,
        stage: str,
        denoise: Callable[[Tensor, Tensor, Any], Tensor],
        cond: Any,
        null: Callable[[], Any],
        options: StageOptions,
        learned_variance: bool = False,
    ) -> Denoise:
        """`denoise` under classifier-free guidance; at scale 1 the null is never computed."""

        def given(context: Any) -> Denoise:
            return lambda x_t, t: denoise(x_t.to(self.dtype), t, context)

        if options.guidance == 1.0:
            return given(cond)
        both = type(cond).cat([cond, null().repeat_interleave(len(cond))])
        num_timesteps = self.schedules[stage].num_timesteps
        return classifier_free(given(both), given(cond), options, num_timesteps, learned_variance)

    def _sample(
        self,
        stage: str,
        denoise: Denoise,
        shape: tuple[int, ...],
        generators: Sequence[torch.Generator],
        options: StageOptions,
        on_step: OnStep | None,
        **network: Any,
    ) -> Tensor:
        x_T = randn(shape, generators, self.device)  # in float32 whatever the networks have
        if x_T.ndim == 4:
            x_T = x_T.to(memory_format=torch.channels_last)

        def report(step: int, num_steps: int, x_0: Tensor) -> None:
            on_step(Progress(stage, step, num_steps, x_0 if x_0.ndim == 4 else None))

        schedule, report = self.schedules[stage], report if on_step else None
        return sample(denoise, x_T, schedule, options, generators=generators, on_step=report, **network)

    def _need_prior(self) -> DiffusionPrior:
        if self.prior is None:
            raise ValueError("this model has no prior and cannot draw from text; use variations(image)")
        return self.prior

    def _check_fit(self) -> None:
        """Networks that were not trained for one another are refused."""
        clip, decoder = self.clip, self.decoder.config
        for stage, config in {"prior": self.prior and self.prior.config, "decoder": decoder}.items():
            for size in ("emb_dim", "text_width"):
                if config and getattr(config, size) != getattr(clip, size):
                    raise ValueError(f"{stage} has {size} {getattr(config, size)}, but CLIP has {getattr(clip, size)}")
        size = decoder.image_size
        for i, upsampler in enumerate(self.upsamplers):
            if upsampler.config.low_size != size:
                raise ValueError(f"upsampler_{i} takes pictures of {upsampler.config.low_size} px, but gets {size} px")
            size = upsampler.config.high_size

    def _check_upsampling(self, options: Sequence[StageOptions]) -> None:
        """Fewer stages than the model has are fine: the picture then stays smaller."""
        if len(options) > len(self.upsamplers):
            have = len(self.upsamplers)
            raise ValueError(
                f"options for {len(options)} upsamplers, but the model has {have}; start from pipe.options"
            )
