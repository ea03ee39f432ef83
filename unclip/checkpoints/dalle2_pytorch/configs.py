"""DALLE2-pytorch's configurations -> configurations of our networks, for each of its releases.

A field with a single possible value supports no other, for the reason next to it.

Sources: `train_configs.py` and `dalle2_pytorch.py` of releases 0.15.4 to 1.15.6. Releases compute
differently under the same tensor names; a checkpoint is sampled as in the release that trained it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from torch import Tensor

from unclip.checkpoints.dalle2_pytorch.files import Release
from unclip.config import parse
from unclip.diffusion.schedules import Prediction
from unclip.models.published.cross_attention_decoder import (
    CrossAttentionDecoderConfig,
    CrossAttentionUpsamplerConfig,
)
from unclip.models.published.cross_attention_unet import CrossAttentionUNetConfig, CrossLevel
from unclip.models.published.relative_prior import RelativePriorConfig

T = TypeVar("T")

# Settings of training, or without an effect on images: accepted with any value.
UNUSED = frozenset(
    "attn_dropout base_model_kwargs blur_kernel_size blur_prob blur_sigma clip_adapter_overrides "
    "clip_denoised clip_x_start ff_dropout image_channels loss_type lowres_downsample_first "
    "lowres_noise_sample_level p2_loss_weight_gamma p2_loss_weight_k random_crop_sizes "
    "sampling_final_clamp_l2norm use_blur_for_lowres_cond vb_loss_weight".split()
)

CLIP_TOKENS = 77  # every caption is padded to this length


@dataclass(frozen=True)
class ClipSource:
    make: str = "openai"
    model: str = "ViT-L/14"


@dataclass(frozen=True)
class PriorNetSource:
    dim: int
    depth: int
    max_text_len: int | None = None
    num_timesteps: int | None = None
    num_time_embeds: Literal[1] = 1  # the prior has one token for t
    num_image_embeds: Literal[1] = 1  # the prior has one token for x_t
    num_text_embeds: Literal[1] = 1  # the prior has one token for the text embedding
    dim_head: int = 64
    heads: int = 8
    ff_mult: float = 4
    norm_in: bool = False
    norm_out: bool = True
    final_proj: bool = True
    normformer: bool = False
    rotary_emb: bool = True
    self_cond: Literal[False] = False  # the prior is not conditioned on its previous estimate


@dataclass(frozen=True)
class PriorSource:
    """`prior` of a prior_config.json."""

    net: PriorNetSource
    image_embed_dim: int
    clip: ClipSource | None = None
    image_size: int | None = None
    timesteps: int = 1000
    sample_timesteps: int | None = None
    cond_drop_prob: float = 0.0
    text_cond_drop_prob: float | None = None
    image_cond_drop_prob: float | None = None
    predict_x_start: Literal[True] = True
    predict_v: Literal[False] = False  # the prior predicts x_0
    beta_schedule: str = "cosine"
    condition_on_text_encodings: Literal[True] = True  # the caption's tokens are always used
    sampling_clamp_l2norm: Literal[False] = False  # estimates of x_0 are not normalised
    training_clamp_l2norm: Literal[False] = False
    init_image_embed_l2norm: Literal[False] = False  # sampling starts from plain noise
    image_embed_scale: None = None  # unit vectors are scaled by the root of their width


@dataclass(frozen=True)
class UnetSource:
    """One of `unets`; DALLE2-pytorch ignores keys that are not listed here."""

    dim: int
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    image_embed_dim: int | None = None
    text_embed_dim: int | None = None
    cond_dim: int | None = None
    num_image_tokens: int = 4
    num_time_tokens: int = 2
    channels: Literal[3] = 3  # images have three channels
    self_attn: int | bool | tuple[int | bool, ...] | None = False
    attn_dim_head: int = 32
    attn_heads: int = 16
    lowres_noise_cond: Literal[False] = False  # an upsampler is not conditioned on a noise level
    self_cond: Literal[False] = False  # a U-Net is not conditioned on its previous estimate
    sparse_attn: bool = False
    cosine_sim_cross_attn: bool = False
    cosine_sim_self_attn: bool = False
    cond_on_text_encodings: bool | None = False
    add_image_embeds_to_time: Literal[True] = True  # always added to the time embedding
    init_dim: None = None  # the stem is as wide as the last block
    init_conv_kernel_size: int = 7
    init_cross_embed: bool = True
    init_cross_embed_kernel_sizes: tuple[int, ...] = (3, 7, 15)
    resnet_groups: int | tuple[int, ...] = 8
    resnet_weight_standardization: Literal[False] = False  # weights are used as they are
    num_resnet_blocks: int | tuple[int, ...] = 2
    cross_embed_downsample: Literal[False] = False  # a level is downsampled by one convolution
    memory_efficient: bool = False
    scale_skip_connection: bool = False
    final_conv_kernel_size: int = 1
    combine_upsample_fmaps: Literal[False] = False  # the levels' outputs are not combined


@dataclass(frozen=True)
class DecoderSource:
    """`decoder` of a decoder_config.json."""

    unets: tuple[dict[str, Any], ...]
    image_size: int | None = None
    image_sizes: tuple[int, ...] | None = None
    clip: ClipSource | None = None
    channels: Literal[3] = 3  # images have three channels
    vae: tuple[()] = ()  # images are generated in pixel space
    timesteps: int = 1000
    sample_timesteps: int | tuple[int | None, ...] | None = None
    image_cond_drop_prob: float = 0.1
    text_cond_drop_prob: float = 0.5
    beta_schedule: str | tuple[str, ...] | None = None
    predict_x_start: bool | tuple[bool, ...] = False
    predict_v: bool | tuple[bool, ...] = False
    predict_x_start_for_latent_diffusion: Literal[False] = False
    use_noise_for_lowres_cond: bool | tuple[bool, ...] = False
    learned_variance: bool | tuple[bool, ...] = True
    # A learned variance is interpolated without a sigmoid.
    learned_variance_constrain_frac: Literal[False] = False
    unconditional: Literal[False] = False  # images are generated from an image embedding
    auto_normalize_img: Literal[True] = True  # images are scaled to [-1, 1]
    use_dynamic_thres: bool = False
    dynamic_thres_percentile: float = 0.95
    ddim_sampling_eta: float = 0.0
    condition_on_text_encodings: Any = None  # of early releases; each U-Net has its own since

    def __post_init__(self) -> None:
        for name in ("beta_schedule", "predict_v", "predict_x_start", "sample_timesteps"):
            if len(self.each(name)) != len(self.unets):
                raise ValueError(f"{name} has {len(self.each(name))} values, not {len(self.unets)}")
        if any(self.each("use_noise_for_lowres_cond")):  # low-resolution images have no noise
            raise ValueError(
                f"use_noise_for_lowres_cond is {self.use_noise_for_lowres_cond}; expected False"
            )
        if not self.unets or len(self.sizes) != len(self.unets):
            raise ValueError(f"{len(self.unets)} U-Nets have {len(self.sizes)} image_sizes")

    def each(self, name: str) -> tuple[Any, ...]:
        """Return a setting for each U-Net; a single value applies to all."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.unets)

    @property
    def learned_variances(self) -> tuple[bool, ...]:
        """Whether each U-Net learns its variance; False where the configuration has no value."""
        given = self.learned_variance
        given = given if isinstance(given, tuple) else (given,)
        return (*given, *(False,) * len(self.unets))[: len(self.unets)]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Image sizes, ascending."""
        return tuple(sorted(self.image_sizes or ([self.image_size] if self.image_size else ())))

    @property
    def schedules(self) -> tuple[str, ...]:
        if self.beta_schedule is not None:
            return self.each("beta_schedule")
        last = "linear" if len(self.unets) > 1 else "cosine"
        return ("cosine",) * (len(self.unets) - 1) + (last,)

    def prediction(self, i: int) -> Prediction:
        if self.each("predict_v")[i]:
            return "v"
        return "x0" if self.each("predict_x_start")[i] else "eps"


def read(kind: type[T], data: Any, where: str) -> T:
    """Read a section of a configuration. Raises ValueError for unknown keys and values."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is a {type(data).__name__}; expected a mapping")
    if kind is UnetSource:
        known = {field.name for field in fields(UnetSource)}
        data = {key: value for key, value in data.items() if key in known}
    return parse(kind, _used(data), where)


def _used(data: Mapping[str, Any]) -> dict[str, Any]:
    used = {name: value for name, value in data.items() if name not in UNUSED}
    return {name: _used(x) if isinstance(x, Mapping) else x for name, x in used.items()}


def prior_config(
    source: PriorSource, state: Mapping[str, Tensor], release: Release, where: str
) -> tuple[RelativePriorConfig, int]:
    """Return the prior's configuration and the factor of its position bias."""
    # Releases that were current for hours in 2022 and compute differently from all others.
    if (0, 16) <= release < (0, 16, 2) or (0, 22, 2) <= release < (0, 23, 3):
        raise ValueError(f"{where} is of release {dotted(release)}, which is not supported")
    net, learned = source.net, release >= (0, 23, 3)
    if net.dim != source.image_embed_dim:
        dims = f"net.dim is {net.dim}, but image_embed_dim is {source.image_embed_dim}"
        raise ValueError(f"{where}: {dims}; expected the same width")
    if net.num_timesteps is not None and net.num_timesteps < source.timesteps:
        expected = f"expected at least {source.timesteps}"
        raise ValueError(f"{where}: net.num_timesteps is {net.num_timesteps}; {expected}")
    drop = source.text_cond_drop_prob
    drop = source.cond_drop_prob if drop is None else drop
    slots = state.get("net.null_text_encodings", state.get("net.null_text_embed"))  # (1, N, C)
    length = net.max_text_len or (CLIP_TOKENS if slots is None else slots.shape[1])
    # Scores were divided by this for half precision, and multiplied again with the bias (CogView).
    bias_scale = 1
    if (0, 16, 2) <= release < (0, 23, 3):
        bias_scale = 1024
    elif learned and release < (1, 4, 3):
        bias_scale = 128
    # Until 1.9 the null text did not reach the transformer; until 1.10.4 it kept the embedding.
    null = ("learned" if release >= (1, 10, 4) else None) if learned else "masked"
    config = RelativePriorConfig(
        width=net.dim,
        context_length=length if learned else CLIP_TOKENS,
        depth=net.depth,
        heads=net.heads,
        head_dim=net.dim_head,
        mlp_ratio=net.ff_mult,
        mlp_norm=net.normformer,
        num_timesteps=net.num_timesteps,
        padding="learned" if learned else "masked",
        text_null=null if drop > 0 else None,
        similarity="cosine" if release >= (1, 4, 3) else "dot",
        rotary=net.rotary_emb,
        norm_in=net.norm_in,
        norm_out=net.norm_out,
        peak_norms="last" if learned else "all" if release >= (0, 16, 2) else "none",
        head=net.final_proj,
    )
    return config, bias_scale


def decoder_config(
    source: DecoderSource, state: Mapping[str, Tensor], release: Release, where: str
) -> CrossAttentionDecoderConfig:
    """Return the config of the first U-Net, which generates an image from an image embedding."""
    unet = read(UnetSource, source.unets[0], f"{where}.unets.0")
    if unet.image_embed_dim is None or unet.image_embed_dim == (unet.cond_dim or unet.dim):
        # If it equals cond_dim, there are no image tokens.
        expected = "expected the width of CLIP's embeddings, different from cond_dim"
        raise ValueError(f"{where}.unets.0: image_embed_dim is {unet.image_embed_dim}; {expected}")
    if unet.cond_on_text_encodings and unet.text_embed_dim is None:
        raise ValueError(f"{where}.unets.0: text_embed_dim is missing; the decoder reads text")
    return CrossAttentionDecoderConfig(
        unet=unet_config(unet, source, 0, state, release, where),
        image_size=source.sizes[0],
        emb_dim=unet.image_embed_dim,
        text_width=unet.text_embed_dim if unet.cond_on_text_encodings else None,
        image_tokens=unet.num_image_tokens,
        text_slots=state["unets.0.null_text_embed"].shape[1]
        if "unets.0.null_text_embed" in state
        else CLIP_TOKENS,
        prediction=source.prediction(0),
        learned_variance=source.learned_variances[0],
    )


def upsampler_config(
    source: DecoderSource, i: int, state: Mapping[str, Tensor], release: Release, where: str
) -> CrossAttentionUpsamplerConfig:
    """Return the config of U-Net i > 0, which upsamples the previous one's image."""
    unet = read(UnetSource, source.unets[i], f"{where}.unets.{i}")
    if unet.cond_on_text_encodings:
        raise ValueError(f"{where}.unets.{i} is conditioned on text, which is not supported")
    return CrossAttentionUpsamplerConfig(
        unet=unet_config(unet, source, i, state, release, where),
        low_size=source.sizes[i - 1],
        high_size=source.sizes[i],
        prediction=source.prediction(i),
        learned_variance=source.learned_variances[i],
    )


def unet_config(
    unet: UnetSource,
    source: DecoderSource,
    i: int,
    state: Mapping[str, Tensor],
    release: Release,
    where: str,
) -> CrossAttentionUNetConfig:
    prefix, count, upsampler = f"unets.{i}.", len(unet.dim_mults), i > 0
    if unet.sparse_attn and (1, 2, 0) <= release < (1, 4, 0):
        raise ValueError(f"{where}: sparse_attn of releases 1.2 and 1.3 is not supported")

    def each(value: Any) -> tuple[Any, ...]:
        value = value if isinstance(value, tuple) else (value,) * count
        if len(value) != count:
            raise ValueError(f"{where}.unets.{i} has {len(value)} values for {count} levels")
        return value

    def has(name: str) -> bool:
        return f"{prefix}{name}" in state

    # Resampling changed between releases; the tensor names show it.
    down = "unshuffle" if has("downs.0.0.1.weight") or has("downs.0.4.1.weight") else "conv"
    up = "nearest" if has("ups.0.3.1.weight") else "transposed"
    up = "shuffle" if has("ups.0.3.net.0.weight") else up
    settings = map(each, (unet.num_resnet_blocks, unet.self_attn, unet.resnet_groups))
    levels = zip(unet.dim_mults, *settings, strict=True)
    rest = "linear" if unet.sparse_attn else None
    return CrossAttentionUNetConfig(
        in_channels=6 if upsampler else 3,
        out_channels=6 if source.learned_variances[i] else 3,
        channels=unet.dim,
        levels=tuple(
            CrossLevel(unet.dim * m, n, "full" if attends else rest, g)
            for m, n, attends, g in levels
        ),
        token_dim=unet.cond_dim or unet.dim,
        time_tokens=unet.num_time_tokens,
        stem=unet.init_cross_embed_kernel_sizes
        if unet.init_cross_embed
        else (unet.init_conv_kernel_size,),
        shrink_first=unet.memory_efficient,
        down=down,
        up=up,
        heads=unet.attn_heads,
        head_dim=unet.attn_dim_head,
        pixel_similarity="cosine" if unet.cosine_sim_self_attn else "dot",
        # Since 1.4.3 queries are scaled twice.
        pixel_scale=1 / unet.attn_dim_head if release >= (1, 4, 3) else None,
        token_similarity="cosine" if unet.cosine_sim_cross_attn else "dot",
        unit_values=release >= (1, 4, 0),
        peak_norms=(0, 16, 2) <= release < (0, 23, 3),
        skip_scale=2**-0.5 if unet.scale_skip_connection else 1.0,
        head_kernel=unet.final_conv_kernel_size,
        head_sees=3 if upsampler and release >= (0, 24, 0) else 0,
    )


def dotted(release: Release) -> str:
    return ".".join(map(str, release))
