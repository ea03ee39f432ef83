"""diffusers' unCLIP around the weights of ours: its classes, its scheduler, and its pipeline stage by stage."""

# B batch (2B rows where it is guided: nulls first), L text tokens, D CLIP embedding width, s and S sides of pictures

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import unclip.clip  # noqa: F401 - first: it declares what a mismatched torchvision lacks, which diffusers imports

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
from unclip.evaluation.bench.calls import Inputs
from unclip.evaluation.bench.clock import Stage
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
SOME_T = 500  # where both sides' answers are compared
CROP = 64  # pixels of a side on which the upsamplers' are


# -- networks: every matrix is shared with ours, convolutions are copied into diffusers' memory format


def reference_prior(ours: DiffusionPrior) -> PriorTransformer:
    dtype, device = ours.query.dtype, ours.query.device
    network = _given(
        PriorTransformer,
        write_prior(ours.config),
        ours.state_dict(),
        prior_rules(ours.config),
        dtype,
    )
    size = network.causal_attention_mask.shape[-1]
    mask = torch.full((1, size, size), -10000.0, dtype=dtype, device=device).triu(
        1
    )  # no part of the state
    network.register_buffer("causal_attention_mask", mask, persistent=False)
    return network


def reference_decoder(ours: Decoder) -> tuple[UnCLIPTextProjModel, UNet2DConditionModel]:
    unet, projection = write_decoder(ours.config)
    around = {
        name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("unet.")
    }
    dtype = ours.null_image.dtype
    return (
        _given(UnCLIPTextProjModel, projection, around, text_proj_rules(), dtype),
        _given(
            UNet2DConditionModel, unet, ours.unet.state_dict(), unet_rules(ours.config.unet), dtype
        ),
    )


def reference_upsampler(ours: Upsampler) -> tuple[UNet2DModel, UNet2DModel]:
    """The networks of all steps but the last, and of the last."""
    unets = [unet for unet in (ours.unet, ours.last_unet) if unet is not None]
    config, dtype = write_unet(ours.config.unet, ours.config.high_size), ours.unet.stem.weight.dtype
    found = [
        _given(UNet2DModel, config, unet.state_dict(), unet_rules(unet.config), dtype)
        for unet in unets
    ]
    return found[0], found[-1]


def _given(
    kind: type[M],
    config: dict[str, Any],
    state: dict[str, Tensor],
    rules: Iterable[Rule],
    dtype: torch.dtype,
) -> M:
    with torch.device("meta"):
        network = kind.from_config(config)
    theirs = {
        name: tensor.to(dtype).contiguous() for name, tensor in export_state(state, rules).items()
    }
    network.load_state_dict(theirs, assign=True)
    return network.eval().requires_grad_(False)


def compile_networks(networks: Iterable[nn.Module]) -> None:
    """Through torch.compile, in place, as ours are by `unclip.compile`."""
    for network in networks:
        on_cuda = next(network.parameters()).is_cuda
        network.compile(dynamic=False, mode="reduce-overhead" if on_cuda else None)


# -- stages: what diffusers' pipeline does from the text's encoding on, callable one by one


class ReferencePrior:
    def __init__(self, ours: UnCLIPPipeline) -> None:
        self.ours, self.network = ours, reference_prior(ours.prior)
        self.networks = (self.network,)

    def sample(
        self, text: TextEncoding, generators: Generators, options: StageOptions, on_step: OnStep
    ) -> Tensor:
        """Encodings of 2B texts -> image embeddings (B, D)."""

        def predict(x: Tensor, t: Tensor, last: bool) -> Tensor:
            null, cond = self._predict(torch.cat([x, x]), t, text).chunk(2)
            return null + options.guidance * (cond - null)

        shape = (len(generators), self.network.config.embedding_dim)
        x = _sample(predict, shape, text.emb, "prior", generators, options, on_step)
        return self.network.post_process_latents(x)

    def call(self, inputs: Inputs) -> Stage[Tensor]:
        text, options = (
            guided_text(self.ours, inputs.prompts, inputs.num_images),
            self.ours.options.prior,
        )
        return lambda on_step: self.sample(text, inputs.generators(), options, on_step)

    def answers(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        """Theirs and ours to the same question."""
        text = guided_text(self.ours, inputs.prompts, inputs.num_images)
        x_t, t = _question(text.emb.shape, self.ours)
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
        """Image embeddings (B, D) and encodings of 2B texts -> pictures (B, 3, s, s)."""
        given = self._condition(image_emb, text)

        def predict(x: Tensor, t: Tensor, last: bool) -> Tensor:
            both = self.network(torch.cat([x, x]), t, **given).sample
            (null, _), (cond, variance) = (half.chunk(2, dim=1) for half in both.chunk(2))
            return torch.cat([null + options.guidance * (cond - null), variance], dim=1)

        size = self.network.config.sample_size
        shape = (len(generators), 3, size, size)
        return _sample(predict, shape, text.emb, "decoder", generators, options, on_step).clamp(
            -1, 1
        )

    def call(self, inputs: Inputs) -> Stage[Tensor]:
        text, options = (
            guided_text(self.ours, inputs.prompts, inputs.num_images),
            self.ours.options.decoder,
        )
        return lambda on_step: self.sample(
            inputs.image_emb, text, inputs.generators(), options, on_step
        )

    def answers(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        ours, size = self.ours, self.network.config.sample_size
        text = guided_text(ours, inputs.prompts, inputs.num_images)
        x_t, t = _question((len(text), 3, size, size), ours)
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
        """Pictures (B, 3, s, s) -> (B, 3, S, S)."""
        first, final = self.networks
        size = first.config.sample_size
        wide = images.to(
            first.device, torch.float32
        )  # in bfloat16 the pipeline stops here on a CPU: there is no kernel
        images = F.interpolate(wide, (size, size), mode="bicubic", antialias=True).to(first.dtype)

        def predict(x: Tensor, t: Tensor, last: bool) -> Tensor:
            return (final if last else first)(torch.cat([x, images], dim=1), t).sample

        return _sample(
            predict, tuple(images.shape), images, "upsampler", generators, options, on_step
        )

    def call(self, inputs: Inputs) -> Stage[Tensor]:
        (options,) = self.ours.options.upsamplers
        return lambda on_step: self.sample(inputs.small, inputs.generators(), options, on_step)

    def answers(self, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        """Of both networks, on a crop."""
        (ours,) = self.ours.upsamplers
        x, t = _question((len(inputs.image_emb), 6, CROP, CROP), self.ours)
        x_t, low_res = x.chunk(2, dim=1)
        return [
            (theirs(x, t).sample, (ours.denoise_last if last else ours.denoise)(x_t, t, low_res))
            for last, theirs in enumerate(self.networks)
        ]


REFERENCES = {"prior": ReferencePrior, "decoder": ReferenceDecoder, "upsampler": ReferenceUpsampler}
ReferenceStage = ReferencePrior | ReferenceDecoder | ReferenceUpsampler


@torch.no_grad()
def guided_text(ours: UnCLIPPipeline, prompts: Sequence[str], num_images: int = 1) -> TextEncoding:
    """The empty prompt for each of B rows, then the prompts; by our CLIP, so that both sides are told the same."""
    rows = [
        ours.clip.encode_text(texts).repeat_interleave(num_images)
        for texts in ([""] * len(prompts), prompts)
    ]
    parts = zip(*((text.emb, text.states, text.mask) for text in rows), strict=True)
    return TextEncoding(*(torch.cat(pair) for pair in parts)).to(ours.device, ours.dtype)


@torch.no_grad()
def difference(stage: ReferenceStage, inputs: Inputs) -> float:
    """The largest between both sides' answers to one question, in standard deviations of the reference's."""
    pairs = [(theirs.float(), ours.float()) for theirs, ours in stage.answers(inputs)]
    return max(((theirs - ours).abs().max() / theirs.std()).item() for theirs, ours in pairs)


def draw(
    stages: dict[str, ReferenceStage],
    prompts: Sequence[str],
    generators: Generators,
    options: UnCLIPOptions,
) -> Tensor:
    """Prompts -> pictures (B, 3, S, S) in [-1, 1], a generator for each."""

    def on_step(_: object) -> None:
        pass

    prior, decoder, upsampler = (stages[name] for name in REFERENCES)
    (upsampling,) = options.upsamplers
    text = guided_text(prior.ours, prompts)
    image_emb = prior.sample(text, generators, options.prior, on_step)
    small = decoder.sample(image_emb, text, generators, options.decoder, on_step)
    return upsampler.sample(small, generators, upsampling, on_step).clamp(-1, 1)


def _question(shape: Sequence[int], ours: UnCLIPPipeline) -> tuple[Tensor, Tensor]:
    """Noise, and a timestep for each row."""
    x_t = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(
        ours.device, ours.dtype
    )
    return x_t, torch.full((shape[0],), SOME_T, device=ours.device)


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
