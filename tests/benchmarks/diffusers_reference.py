"""diffusers' unCLIP, stage by stage, sharing the weights of our networks."""

# B batch (2B rows with guidance: unconditional first), L text tokens, D CLIP embedding width,
# s image size of the decoder, S of the upsampler

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import unclip.clip  # noqa: F401 - before diffusers, which imports torchvision

# isort: split
import torch
import torch.nn.functional as F
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor, nn

from unclip.checkpoints.diffusers.configs import write_decoder, write_prior, write_unet
from unclip.checkpoints.diffusers.names import prior_rules, text_proj_rules, unet_rules
from unclip.checkpoints.renaming import Rule, export_state
from unclip.diffusion.samplers import randn
from unclip.evaluation.bench.stage_calls import Inputs
from unclip.evaluation.bench.timing import Stage
from unclip.models.unclip.decoder import Decoder
from unclip.models.unclip.prior import DiffusionPrior
from unclip.models.unclip.upsampler import Upsampler
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline
from unclip.types import OnStep, StageOptions, TextEncoding, UnCLIPOptions

M = TypeVar("M", bound=nn.Module)
Generators = Sequence[torch.Generator]
SCHEDULERS = {  # Karlo's
    "prior": {"prediction_type": "sample", "clip_sample_range": 5.0},
    "decoder": {"variance_type": "learned_range"},
    "upsampler": {},
}
COMPARED_T = 500  # timestep at which the outputs of both sides are compared
CROP = 64  # image size at which those of the upsamplers are compared


# -- networks: matrices are shared with ours, convolutions are copied into diffusers' memory format


def reference_prior(ours: DiffusionPrior) -> PriorTransformer:
    dtype, device, rules = ours.query.dtype, ours.query.device, prior_rules(ours.config)
    config = write_prior(ours.config)
    network = _load(PriorTransformer, config, ours.state_dict(), rules, dtype)
    size = network.causal_attention_mask.shape[-1]
    mask = torch.full((1, size, size), -10000.0, dtype=dtype, device=device).triu(1)
    network.register_buffer("causal_attention_mask", mask, persistent=False)  # not in the state
    return network


def reference_decoder(ours: Decoder) -> tuple[UnCLIPTextProjModel, UNet2DConditionModel]:
    unet_config, projection_config = write_decoder(ours.config)
    dtype, rules = ours.null_image.dtype, unet_rules(ours.config.unet)
    state = {name: x for name, x in ours.state_dict().items() if not name.startswith("unet.")}
    projection = _load(UnCLIPTextProjModel, projection_config, state, text_proj_rules(), dtype)
    unet = _load(UNet2DConditionModel, unet_config, ours.unet.state_dict(), rules, dtype)
    return projection, unet


def reference_upsampler(ours: Upsampler) -> tuple[UNet2DModel, UNet2DModel]:
    """Return the network of all steps but the last, and that of the last step."""
    config, dtype = write_unet(ours.config.unet, ours.config.high_size), ours.unet.stem.weight.dtype
    networks = [
        _load(UNet2DModel, config, unet.state_dict(), unet_rules(unet.config), dtype)
        for unet in (ours.unet, ours.last_unet)
        if unet is not None
    ]
    return networks[0], networks[-1]


def _load(
    cls: type[M],
    config: dict[str, Any],
    state: dict[str, Tensor],
    rules: Iterable[Rule],
    dtype: torch.dtype,
) -> M:
    with torch.device("meta"):
        network = cls.from_config(config)
    renamed = export_state(state, rules)
    state = {name: tensor.to(dtype).contiguous() for name, tensor in renamed.items()}
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def compile_networks(networks: Iterable[nn.Module]) -> None:
    """Apply torch.compile in place, like `unclip.compile`."""
    for network in networks:
        on_cuda = next(network.parameters()).is_cuda
        network.compile(dynamic=False, mode="reduce-overhead" if on_cuda else None)


# -- stages: the diffusers pipeline after text encoding, one call per stage


class ReferencePrior:
    def __init__(self, ours: UnCLIPPipeline) -> None:
        self.ours, self.network = ours, reference_prior(ours.prior)
        self.networks = (self.network,)

    def sample(
        self, text: TextEncoding, generators: Generators, options: StageOptions, on_step: OnStep
    ) -> Tensor:
        """Text encodings (2B rows) -> image embeddings (B, D)."""

        def predict(x: Tensor, t: Tensor, last: bool) -> Tensor:
            null, cond = self._predict(torch.cat([x, x]), t, text).chunk(2)
            return null + options.guidance * (cond - null)

        shape = (len(generators), self.network.config.embedding_dim)
        x = _sample(predict, shape, text.emb, "prior", generators, options, on_step)
        return self.network.post_process_latents(x)

    def call(self, inputs: Inputs) -> Stage[Tensor]:
        text = guided_text(self.ours, inputs.prompts, inputs.num_images)
        options = self.ours.options.prior
        return lambda on_step: self.sample(text, inputs.generators(), options, on_step)

    def outputs(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        """Return the outputs of both sides for the same inputs."""
        text = guided_text(self.ours, inputs.prompts, inputs.num_images)
        x_t, t = _noisy_inputs(text.emb.shape, self.ours)
        return [(self._predict(x_t, t, text), self.ours.prior(x_t, t, text))]

    def _predict(self, x_t: Tensor, t: Tensor, text: TextEncoding) -> Tensor:
        return self.network(x_t, t, text.emb, text.states, text.mask).predicted_image_embedding


class ReferenceDecoder:
    def __init__(self, ours: UnCLIPPipeline) -> None:
        self.ours = ours
        self.networks = self.projection, self.network = reference_decoder(ours.decoder)

    def sample(
        self,
        image_emb: Tensor,
        text: TextEncoding,
        generators: Generators,
        options: StageOptions,
        on_step: OnStep,
    ) -> Tensor:
        """Embeddings (B, D) and text encodings (2B rows) -> images (B, 3, s, s)."""
        given = self._condition(image_emb, text)

        def predict(x: Tensor, t: Tensor, last: bool) -> Tensor:
            both = self.network(torch.cat([x, x]), t, **given).sample
            (null, _), (cond, variance) = (half.chunk(2, dim=1) for half in both.chunk(2))
            return torch.cat([null + options.guidance * (cond - null), variance], dim=1)

        size = self.network.config.sample_size
        shape = (len(generators), 3, size, size)
        images = _sample(predict, shape, text.emb, "decoder", generators, options, on_step)
        return images.clamp(-1, 1)

    def call(self, inputs: Inputs) -> Stage[Tensor]:
        text = guided_text(self.ours, inputs.prompts, inputs.num_images)
        options = self.ours.options.decoder
        return lambda on_step: self.sample(
            inputs.image_emb, text, inputs.generators(), options, on_step
        )

    def outputs(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        ours, size = self.ours, self.network.config.sample_size
        text = guided_text(ours, inputs.prompts, inputs.num_images)
        x_t, t = _noisy_inputs((len(text), 3, size, size), ours)
        image_emb = inputs.image_emb.to(ours.device, ours.dtype)
        nulls = torch.arange(len(text), device=ours.device) < len(image_emb)
        theirs = self.network(x_t, t, **self._condition(image_emb, text)).sample
        return [(theirs, ours.decoder(x_t, t, image_emb.repeat(2, 1), text, drop_image=nulls))]

    def _condition(self, image_emb: Tensor, text: TextEncoding) -> dict[str, Tensor]:
        context, time_shift = self.projection(
            image_embeddings=image_emb.to(text.emb),
            prompt_embeds=text.emb,
            text_encoder_hidden_states=text.states,
            do_classifier_free_guidance=True,
        )
        mask = F.pad(text.mask, (self.projection.clip_extra_context_tokens, 0), value=True)
        return {
            "encoder_hidden_states": context,
            "class_labels": time_shift,
            "attention_mask": mask,
        }


class ReferenceUpsampler:
    def __init__(self, ours: UnCLIPPipeline) -> None:
        (upsampler,) = ours.upsamplers
        self.ours, self.networks = ours, reference_upsampler(upsampler)

    def sample(
        self, images: Tensor, generators: Generators, options: StageOptions, on_step: OnStep
    ) -> Tensor:
        """Images (B, 3, s, s) -> (B, 3, S, S)."""
        first, final = self.networks
        size = first.config.sample_size
        images = images.to(first.device, torch.float32)  # resizing has no bfloat16 kernel on CPUs
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).to(first.dtype)

        def predict(x: Tensor, t: Tensor, last: bool) -> Tensor:
            return (final if last else first)(torch.cat([x, images], dim=1), t).sample

        shape = tuple(images.shape)
        return _sample(predict, shape, images, "upsampler", generators, options, on_step)

    def call(self, inputs: Inputs) -> Stage[Tensor]:
        (options,) = self.ours.options.upsamplers
        return lambda on_step: self.sample(inputs.low_res, inputs.generators(), options, on_step)

    def outputs(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        """Return the outputs of both networks on a crop."""
        (ours,) = self.ours.upsamplers
        x, t = _noisy_inputs((len(inputs.image_emb), 6, CROP, CROP), self.ours)
        x_t, low_res = x.chunk(2, dim=1)
        return [
            (theirs(x, t).sample, (ours.denoise_last if last else ours.denoise)(x_t, t, low_res))
            for last, theirs in enumerate(self.networks)
        ]


REFERENCES = {"prior": ReferencePrior, "decoder": ReferenceDecoder, "upsampler": ReferenceUpsampler}
ReferenceStage = ReferencePrior | ReferenceDecoder | ReferenceUpsampler


@torch.no_grad()
def guided_text(ours: UnCLIPPipeline, prompts: Sequence[str], num_images: int = 1) -> TextEncoding:
    """Encode the empty prompt B times, then the prompts, by our CLIP on both sides."""
    rows = [
        ours.clip.encode_text(texts).repeat_interleave(num_images)
        for texts in ([""] * len(prompts), prompts)
    ]
    parts = zip(*((text.emb, text.states, text.mask) for text in rows), strict=True)
    return TextEncoding(*(torch.cat(pair) for pair in parts)).to(ours.device, ours.dtype)


@torch.no_grad()
def difference(stage: ReferenceStage, inputs: Inputs) -> float:
    """Return the largest difference of the outputs, in standard deviations of the reference."""
    pairs = [(theirs.float(), ours.float()) for theirs, ours in stage.outputs(inputs)]
    return max(((theirs - ours).abs().max() / theirs.std()).item() for theirs, ours in pairs)


def generate(
    stages: dict[str, ReferenceStage],
    prompts: Sequence[str],
    generators: Generators,
    options: UnCLIPOptions,
) -> Tensor:
    """Generate images (B, 3, S, S) in [-1, 1] of B prompts."""

    def on_step(_: object) -> None:
        pass

    prior, decoder, upsampler = (stages[name] for name in REFERENCES)
    (upsampler_options,) = options.upsamplers
    text = guided_text(prior.ours, prompts)
    image_emb = prior.sample(text, generators, options.prior, on_step)
    low_res = decoder.sample(image_emb, text, generators, options.decoder, on_step)
    return upsampler.sample(low_res, generators, upsampler_options, on_step).clamp(-1, 1)


def _noisy_inputs(shape: Sequence[int], ours: UnCLIPPipeline) -> tuple[Tensor, Tensor]:
    """Return noise, and a timestep for each row."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(*shape, generator=generator).to(ours.device, ours.dtype)
    return x_t, torch.full((shape[0],), COMPARED_T, device=ours.device)


@torch.no_grad()
def _sample(
    predict: Callable[[Tensor, Tensor, bool], Tensor],
    shape: tuple[int, ...],
    like: Tensor,
    stage: str,
    generators: Generators,
    options: StageOptions,
    on_step: OnStep,
) -> Tensor:
    scheduler = UnCLIPScheduler(**SCHEDULERS[stage])
    scheduler.set_timesteps(options.steps, device=like.device)
    x = randn(shape, generators, like.device, like.dtype)
    for t, t_prev in pairwise([*scheduler.timesteps, None]):
        output = predict(x, t, t_prev is None)
        x = scheduler.step(
            output, t, x, prev_timestep=t_prev, generator=list(generators)
        ).prev_sample
        on_step(None)
    return x
