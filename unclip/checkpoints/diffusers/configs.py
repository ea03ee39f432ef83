"""diffusers' config.json of each class as our configuration, and back.

A setting that our networks have no equal for is refused by name, on the way in as on the way out.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from unclip.config import parse, to_dict
from unclip.diffusion.schedules import Prediction, ScheduleConfig
from unclip.files import read_json
from unclip.models.unclip.decoder import DecoderConfig
from unclip.models.unclip.prior import PriorConfig
from unclip.models.unet import UNetConfig

FREE = object()


class Setting(NamedTuple):
    """One argument of a class there: its default, and the only value that we have an equal for (or FREE)."""

    default: Any
    only: Any = FREE


def only(value: Any) -> Setting:
    return Setting(value, value)


PRIOR = {
    "num_attention_heads": Setting(32),
    "attention_head_dim": Setting(64),
    "num_layers": Setting(20),
    "embedding_dim": Setting(768),
    "num_embeddings": Setting(77),
    "additional_embeddings": only(4),
    "dropout": Setting(0.0),
    "time_embed_act_fn": only("silu"),
    "norm_in_type": only(None),
    "embedding_proj_norm_type": only(None),
    "encoder_hid_proj_type": only("linear"),
    "added_emb_type": only("prd"),
    "time_embed_dim": Setting(None),
    "embedding_proj_dim": Setting(None),
    "clip_embed_dim": Setting(None),
}
TEXT_PROJ = {
    "clip_extra_context_tokens": Setting(4),
    "clip_embeddings_dim": Setting(768),
    "time_embed_dim": Setting(None),
    "cross_attention_dim": Setting(None),
}
UNET = {
    "sample_size": Setting(None),
    "in_channels": Setting(3),
    "out_channels": Setting(3),
    "layers_per_block": Setting(2),
    "block_out_channels": Setting(None),
    "down_block_types": Setting(None),
    "up_block_types": Setting(None),
    "attention_head_dim": Setting(8),
    "norm_num_groups": Setting(32),
    "time_embedding_dim": Setting(None),
    "dropout": Setting(0.0),
    "resnet_time_scale_shift": Setting("default"),
    "downsample_padding": Setting(
        1
    ),  # of plain convolutions, which a residual resampling has none of
    "center_input_sample": only(False),
    "flip_sin_to_cos": only(True),
    "freq_shift": only(0),
    "time_embedding_type": only("positional"),
    "mid_block_scale_factor": only(1),
    "act_fn": only("silu"),
    "norm_eps": only(1e-5),
    "num_class_embeds": only(None),
}
CONDITIONAL_UNET = {
    **UNET,
    "cross_attention_dim": Setting(1280),
    "mid_block_type": Setting("UNetMidBlock2DCrossAttn", only="UNetMidBlock2DSimpleCrossAttn"),
    "class_embed_type": Setting(None, only="identity"),
    "conv_in_kernel": only(3),
    "conv_out_kernel": only(3),
    "resnet_out_scale_factor": only(1),
    "attention_type": Setting("default"),  # of transformer blocks, which these levels have none of
    "transformer_layers_per_block": Setting(1),
    "addition_embed_type_num_heads": Setting(64),
}
PLAIN_UNET = {
    **UNET,
    "mid_block_type": only("UNetMidBlock2D"),
    "add_attention": Setting(True, only=False),
    "class_embed_type": only(None),
    "downsample_type": Setting("conv"),
    "upsample_type": Setting("conv"),
    "attn_norm_num_groups": only(None),
    "num_train_timesteps": Setting(None),  # of learned time embeddings
}
_UNETS = {True: ("UNet2DConditionModel", CONDITIONAL_UNET), False: ("UNet2DModel", PLAIN_UNET)}
SCHEDULER = {
    "num_train_timesteps": Setting(1000),
    "variance_type": Setting("fixed_small_log"),
    "clip_sample": Setting(True),
    "clip_sample_range": Setting(1.0),
    "prediction_type": Setting("epsilon"),
    "beta_schedule": only("squaredcos_cap_v2"),
}
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0"}
TIME_SHIFTS = {"scale_shift": "scale_shift", "default": "additive"}
DOWN, UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
ATTENDING_DOWN, ATTENDING_UP = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"


def read(file: Path, kind: str, settings: dict[str, Setting]) -> dict[str, Any]:
    """The settings in a config.json, defaults filled in; ValueError for what has no equal here.

    A setting that is not known (of a later version) may stand there as long as it is off.
    """
    given = {
        name: value
        for name, value in read_json(file).items()
        if name == "_class_name" or name[0] != "_"
    }
    if (found := given.pop("_class_name", None)) != kind:
        raise ValueError(f"{file}: _class_name is {found!r}; expected {kind!r}")
    for name, value in given.items():
        if name not in settings and value not in (None, False):
            raise ValueError(f"{file}: {name} is {value!r}, a setting that is not supported")
    values = {name: given.get(name, setting.default) for name, setting in settings.items()}
    for name, (default, wanted) in settings.items():
        if type(default) in (int, float) and not isinstance(
            values[name], (int, float, list, type(None))
        ):
            raise ValueError(f"{file}: {name} is {values[name]!r}; expected a number")
        off = not (values[name] or wanted)  # None, False and 0 alike
        if wanted is not FREE and values[name] != wanted and not off:
            raise ValueError(f"{file}: {name} is {values[name]!r}; only {wanted!r} is supported")
    return values


def write(kind: str, settings: dict[str, Setting], **values: Any) -> dict[str, Any]:
    """The config.json of a class."""
    assert not (unknown := values.keys() - settings.keys()), f"{kind} has no {unknown}"
    fixed = {
        name: setting.default if setting.only is FREE else setting.only
        for name, setting in settings.items()
    }
    return {"_class_name": kind, "_diffusers_version": version("diffusers"), **fixed, **values}


def read_prior(file: Path, x0_limit: float | None) -> PriorConfig:
    """A PriorTransformer's. Its null text is the empty prompt."""
    values = read(file, "PriorTransformer", PRIOR)
    width, D = values["num_attention_heads"] * values["attention_head_dim"], values["embedding_dim"]
    for name, wanted in {
        "time_embed_dim": width,
        "embedding_proj_dim": D,
        "clip_embed_dim": D,
    }.items():
        if values[name] not in (None, wanted):
            raise ValueError(f"{file}: {name} is {values[name]}; only {wanted} is supported")
    config = {
        "emb_dim": D,
        "text_width": D,
        "context_length": values["num_embeddings"],
        "width": width,
        "depth": values["num_layers"],
        "heads": values["num_attention_heads"],
        "dropout": values["dropout"],
        "null_text": "empty_prompt",
        "x0_limit": x0_limit,
    }
    return parse(PriorConfig, config, str(file))


def write_prior(config: PriorConfig) -> dict[str, Any]:
    return write(
        "PriorTransformer",
        PRIOR,
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        num_layers=config.depth,
        embedding_dim=config.emb_dim,
        num_embeddings=config.context_length,
        dropout=config.dropout,
    )


def read_decoder(
    unet_file: Path, text_proj_file: Path, prediction: Prediction, learned: bool
) -> DecoderConfig:
    """A UNet2DConditionModel's and a UnCLIPTextProjModel's, which must fit together."""
    unet, image_size = read_unet(unet_file, conditional=True)
    proj = read(text_proj_file, "UnCLIPTextProjModel", TEXT_PROJ)
    for name, wanted in {
        "time_embed_dim": unet.time_width,
        "cross_attention_dim": unet.context_dim,
    }.items():
        if proj[name] != wanted:
            raise ValueError(
                f"{text_proj_file}: {name} is {proj[name]}, but the decoder has {wanted}"
            )
    config = {
        "unet": to_dict(unet),
        "image_size": image_size,
        "emb_dim": proj["clip_embeddings_dim"],
        "text_width": proj["clip_embeddings_dim"],
        "context_tokens": proj["clip_extra_context_tokens"],
        "null_text": "empty_prompt",
        "prediction": prediction,
        "learned_variance": learned,
    }
    return parse(DecoderConfig, config, str(unet_file))


def write_decoder(config: DecoderConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(UNet2DConditionModel's, UnCLIPTextProjModel's)."""
    proj = write(
        "UnCLIPTextProjModel",
        TEXT_PROJ,
        clip_extra_context_tokens=config.context_tokens,
        clip_embeddings_dim=config.emb_dim,
        time_embed_dim=config.unet.time_width,
        cross_attention_dim=config.unet.context_dim,
    )
    return write_unet(config.unet, config.image_size), proj


def read_unet(file: Path, conditional: bool = False) -> tuple[UNetConfig, int]:
    """A UNet2DModel's or UNet2DConditionModel's, and the size of its pictures."""
    kind, settings = _UNETS[conditional]
    values = read(file, kind, settings)
    for name in ("sample_size", "block_out_channels", "down_block_types", "up_block_types"):
        if values[name] is None:
            raise ValueError(f"{file}: {name} is missing")
    types = {DOWN: False, ATTENDING_DOWN: True} if conditional else {DOWN: False}
    if unknown := [name for name in values["down_block_types"] if name not in types]:
        raise ValueError(
            f"{file}: down_block_types holds {unknown[0]!r}; only {' and '.join(types)} are supported"
        )
    attention = [types[name] for name in values["down_block_types"]]
    mirrored = [ATTENDING_UP if attends else UP for attends in reversed(attention)]
    if list(values["up_block_types"]) != mirrored:
        raise ValueError(
            f"{file}: up_block_types is {values['up_block_types']}; expected {mirrored}"
        )
    blocks = values["layers_per_block"]
    blocks = blocks if isinstance(blocks, list) else [blocks] * len(attention)
    head_dim = values["attention_head_dim"]
    if isinstance(head_dim, list):
        if len(set(head_dim)) > 1:
            raise ValueError(
                f"{file}: attention_head_dim is {head_dim}; only one for all levels is supported"
            )
        head_dim = head_dim[0]
    if values["resnet_time_scale_shift"] not in TIME_SHIFTS:
        shift = values["resnet_time_scale_shift"]
        raise ValueError(
            f"{file}: resnet_time_scale_shift is {shift!r}; expected {' or '.join(TIME_SHIFTS)}"
        )
    if not len(values["block_out_channels"]) == len(blocks) == len(attention):
        raise ValueError(
            f"{file}: block_out_channels, layers_per_block and down_block_types are of different lengths"
        )
    config = {
        "in_channels": values["in_channels"],
        "out_channels": values["out_channels"],
        "levels": [
            {"channels": channels, "blocks": n, "attention": attends}
            for channels, n, attends in zip(
                values["block_out_channels"], blocks, attention, strict=True
            )
        ],
        "head_dim": head_dim or 8,
        "time_dim": values["time_embedding_dim"],
        "groups": values["norm_num_groups"],
        "dropout": values["dropout"],
        "time_shift": TIME_SHIFTS[values["resnet_time_scale_shift"]],
        "context_dim": values.get("cross_attention_dim"),
        "mid_attention": conditional,
    }
    return parse(UNetConfig, config, str(file)), values["sample_size"]


def write_unet(config: UNetConfig, size: int) -> dict[str, Any]:
    conditional = config.context_dim is not None
    kind, settings = _UNETS[conditional]
    attention, blocks = (
        [level.attention for level in config.levels],
        [level.blocks for level in config.levels],
    )
    return write(
        kind,
        settings,
        sample_size=size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        layers_per_block=blocks[0] if len(set(blocks)) == 1 else blocks,
        block_out_channels=[level.channels for level in config.levels],
        down_block_types=[ATTENDING_DOWN if attends else DOWN for attends in attention],
        up_block_types=[ATTENDING_UP if attends else UP for attends in reversed(attention)],
        attention_head_dim=config.head_dim,
        norm_num_groups=config.groups,
        time_embedding_dim=config.time_dim,
        dropout=config.dropout,
        resnet_time_scale_shift={here: there for there, here in TIME_SHIFTS.items()}[
            config.time_shift
        ],
        **({"cross_attention_dim": config.context_dim} if conditional else {}),
    )


class Scheduler(NamedTuple):
    """What an UnCLIPScheduler knows of a stage."""

    schedule: ScheduleConfig
    prediction: Prediction
    learned_variance: bool
    limit: float | None  # what estimates of x_0 are clipped to


def read_scheduler(file: Path) -> Scheduler:
    values = read(file, "UnCLIPScheduler", SCHEDULER)
    if values["prediction_type"] not in PREDICTIONS:
        kind = values["prediction_type"]
        raise ValueError(
            f"{file}: prediction_type is {kind!r}; expected {' or '.join(PREDICTIONS)}"
        )
    if values["variance_type"] not in ("fixed_small_log", "learned_range"):
        kind = values["variance_type"]
        raise ValueError(
            f"{file}: variance_type is {kind!r}; expected fixed_small_log or learned_range"
        )
    config = {
        "kind": "cosine",
        "num_timesteps": values["num_train_timesteps"],
        "precision": "float32",
    }
    return Scheduler(
        parse(ScheduleConfig, config, str(file)),
        PREDICTIONS[values["prediction_type"]],
        values["variance_type"] == "learned_range",
        values["clip_sample_range"] if values["clip_sample"] else None,
    )


def write_scheduler(scheduler: Scheduler) -> dict[str, Any]:
    return write(
        "UnCLIPScheduler",
        SCHEDULER,
        num_train_timesteps=scheduler.schedule.num_timesteps,
        variance_type="learned_range" if scheduler.learned_variance else "fixed_small_log",
        clip_sample=scheduler.limit is not None,
        clip_sample_range=scheduler.limit or 1.0,
        prediction_type={here: there for there, here in PREDICTIONS.items()}[scheduler.prediction],
    )
