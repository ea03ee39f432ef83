"""config.json of diffusers' classes <-> our configurations.

A setting that our networks have no equivalent for is an error, both on import and on export.
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

ANY = object()


class Setting(NamedTuple):
    """One argument of a class in diffusers: its default, and the only supported value (or ANY)."""

    default: Any
    supported: Any = ANY


def fixed(value: Any) -> Setting:
    """Return a setting of which only the default is supported."""
    return Setting(value, value)


PRIOR = {
    "num_attention_heads": Setting(32),
    "attention_head_dim": Setting(64),
    "num_layers": Setting(20),
    "embedding_dim": Setting(768),
    "num_embeddings": Setting(77),
    "additional_embeddings": fixed(4),
    "dropout": Setting(0.0),
    "time_embed_act_fn": fixed("silu"),
    "norm_in_type": fixed(None),
    "embedding_proj_norm_type": fixed(None),
    "encoder_hid_proj_type": fixed("linear"),
    "added_emb_type": fixed("prd"),
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
    "downsample_padding": Setting(1),  # of plain convolutions; residual resampling has none
    "center_input_sample": fixed(False),
    "flip_sin_to_cos": fixed(True),
    "freq_shift": fixed(0),
    "time_embedding_type": fixed("positional"),
    "mid_block_scale_factor": fixed(1),
    "act_fn": fixed("silu"),
    "norm_eps": fixed(1e-5),
    "num_class_embeds": fixed(None),
}
CONDITIONAL_UNET = {
    **UNET,
    "cross_attention_dim": Setting(1280),
    "mid_block_type": Setting("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"),
    "class_embed_type": Setting(None, "identity"),
    "conv_in_kernel": fixed(3),
    "conv_out_kernel": fixed(3),
    "resnet_out_scale_factor": fixed(1),
    "attention_type": Setting("default"),  # of transformer blocks, which these levels do not have
    "transformer_layers_per_block": Setting(1),
    "addition_embed_type_num_heads": Setting(64),
}
PLAIN_UNET = {
    **UNET,
    "mid_block_type": fixed("UNetMidBlock2D"),
    "add_attention": Setting(True, False),
    "class_embed_type": fixed(None),
    "downsample_type": Setting("conv"),
    "upsample_type": Setting("conv"),
    "attn_norm_num_groups": fixed(None),
    "num_train_timesteps": Setting(None),  # of learned time embeddings
}
_UNETS = {True: ("UNet2DConditionModel", CONDITIONAL_UNET), False: ("UNet2DModel", PLAIN_UNET)}
SCHEDULER = {
    "num_train_timesteps": Setting(1000),
    "variance_type": Setting("fixed_small_log"),
    "clip_sample": Setting(True),
    "clip_sample_range": Setting(1.0),
    "prediction_type": Setting("epsilon"),
    "beta_schedule": fixed("squaredcos_cap_v2"),
}
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0"}
LEARNED_VARIANCE = {"fixed_small_log": False, "learned_range": True}
TIME_SHIFTS = {"scale_shift": "scale_shift", "default": "additive"}
# block types without and with attention
DOWN = {False: "ResnetDownsampleBlock2D", True: "SimpleCrossAttnDownBlock2D"}
UP = {False: "ResnetUpsampleBlock2D", True: "SimpleCrossAttnUpBlock2D"}


def read(file: Path, kind: str, settings: dict[str, Setting]) -> dict[str, Any]:
    """Read the settings in a config.json, with defaults. Raises ValueError for unsupported values.

    An unknown setting (of a later version) is accepted if it is off.
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
            raise ValueError(f"{file}: {name} is {value!r}; this setting is not supported")
    values = {name: given.get(name, setting.default) for name, setting in settings.items()}
    for name, (default, supported) in settings.items():
        value = values[name]
        if type(default) in (int, float) and not isinstance(value, (int, float, list, type(None))):
            raise ValueError(f"{file}: {name} is {value!r}; expected a number")
        off = not (value or supported)  # None, False and 0 alike
        if supported is not ANY and value != supported and not off:
            raise ValueError(f"{file}: {name} is {value!r}; only {supported!r} is supported")
    return values


def write(kind: str, settings: dict[str, Setting], **values: Any) -> dict[str, Any]:
    """Return the config.json of a class."""
    assert not (unknown := values.keys() - settings.keys()), f"{kind} has no {unknown}"
    rest = {
        name: setting.default if setting.supported is ANY else setting.supported
        for name, setting in settings.items()
    }
    return {"_class_name": kind, "_diffusers_version": version("diffusers"), **rest, **values}


def _choose(file: Path, values: dict[str, Any], name: str, choices: dict[str, Any]) -> Any:
    """Translate a setting. Raises ValueError if it is not one of the choices."""
    if values[name] not in choices:
        raise ValueError(f"{file}: {name} is {values[name]!r}; expected {' or '.join(choices)}")
    return choices[values[name]]


def _key(choices: dict[str, Any], value: Any) -> str:
    return next(key for key, choice in choices.items() if choice == value)


def read_prior(file: Path, x0_limit: float | None) -> PriorConfig:
    """PriorTransformer -> PriorConfig; its null text is the empty prompt."""
    values = read(file, "PriorTransformer", PRIOR)
    width, D = values["num_attention_heads"] * values["attention_head_dim"], values["embedding_dim"]
    sizes = {"time_embed_dim": width, "embedding_proj_dim": D, "clip_embed_dim": D}
    for name, size in sizes.items():
        if values[name] not in (None, size):
            raise ValueError(f"{file}: {name} is {values[name]}; only {size} is supported")
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
    """UNet2DConditionModel and a UnCLIPTextProjModel that fits it -> DecoderConfig."""
    unet, image_size = read_unet(unet_file, conditional=True)
    proj = read(text_proj_file, "UnCLIPTextProjModel", TEXT_PROJ)
    sizes = {"time_embed_dim": unet.time_width, "cross_attention_dim": unet.context_dim}
    for name, size in sizes.items():
        if proj[name] != size:
            raise ValueError(f"{text_proj_file}: {name} is {proj[name]}, the decoder has {size}")
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
    """DecoderConfig -> UNet2DConditionModel, UnCLIPTextProjModel."""
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
    """UNet2DModel, or UNet2DConditionModel if conditional -> UNetConfig and image size."""
    values = read(file, *_UNETS[conditional])
    for name in ("sample_size", "block_out_channels", "down_block_types", "up_block_types"):
        if values[name] is None:
            raise ValueError(f"{file}: {name} is missing")
    types = {name: attends for attends, name in DOWN.items() if conditional or not attends}
    if unknown := [name for name in values["down_block_types"] if name not in types]:
        raise ValueError(
            f"{file}: down_block_types has {unknown[0]!r}; only {' and '.join(types)} are supported"
        )
    attention = [types[name] for name in values["down_block_types"]]
    mirrored = [UP[attends] for attends in reversed(attention)]
    if list(values["up_block_types"]) != mirrored:
        raise ValueError(
            f"{file}: up_block_types is {values['up_block_types']}; expected {mirrored}"
        )
    channels, blocks = values["block_out_channels"], values["layers_per_block"]
    blocks = blocks if isinstance(blocks, list) else [blocks] * len(attention)
    if not len(channels) == len(blocks) == len(attention):
        names = "block_out_channels, layers_per_block and down_block_types"
        raise ValueError(f"{file}: {names} differ in length")
    head_dims = values["attention_head_dim"]
    head_dims = head_dims if isinstance(head_dims, list) else [head_dims]
    if len(set(head_dims)) > 1:
        raise ValueError(f"{file}: attention_head_dim is {head_dims}; expected equal numbers")
    levels = zip(channels, blocks, attention, strict=True)
    config = {
        "in_channels": values["in_channels"],
        "out_channels": values["out_channels"],
        "levels": [{"channels": c, "blocks": n, "attention": attends} for c, n, attends in levels],
        "head_dim": head_dims[0] or 8,
        "time_dim": values["time_embedding_dim"],
        "groups": values["norm_num_groups"],
        "dropout": values["dropout"],
        "time_shift": _choose(file, values, "resnet_time_scale_shift", TIME_SHIFTS),
        "context_dim": values.get("cross_attention_dim"),
        "mid_attention": conditional,
    }
    return parse(UNetConfig, config, str(file)), values["sample_size"]


def write_unet(config: UNetConfig, size: int) -> dict[str, Any]:
    """UNetConfig -> UNet2DConditionModel if it has a context, else UNet2DModel."""
    conditional = config.context_dim is not None
    blocks = [level.blocks for level in config.levels]
    return write(
        *_UNETS[conditional],
        sample_size=size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        layers_per_block=blocks[0] if len(set(blocks)) == 1 else blocks,
        block_out_channels=[level.channels for level in config.levels],
        down_block_types=[DOWN[level.attention] for level in config.levels],
        up_block_types=[UP[level.attention] for level in reversed(config.levels)],
        attention_head_dim=config.head_dim,
        norm_num_groups=config.groups,
        time_embedding_dim=config.time_dim,
        dropout=config.dropout,
        resnet_time_scale_shift=_key(TIME_SHIFTS, config.time_shift),
        **({"cross_attention_dim": config.context_dim} if conditional else {}),
    )


class Scheduler(NamedTuple):
    """The content of an UnCLIPScheduler's config."""

    schedule: ScheduleConfig
    prediction: Prediction
    learned_variance: bool
    limit: float | None  # to which estimates of x_0 are clipped


def read_scheduler(file: Path) -> Scheduler:
    values = read(file, "UnCLIPScheduler", SCHEDULER)
    config = {
        "kind": "cosine",
        "num_timesteps": values["num_train_timesteps"],
        "precision": "float32",
    }
    return Scheduler(
        prediction=_choose(file, values, "prediction_type", PREDICTIONS),
        learned_variance=_choose(file, values, "variance_type", LEARNED_VARIANCE),
        schedule=parse(ScheduleConfig, config, str(file)),
        limit=values["clip_sample_range"] if values["clip_sample"] else None,
    )


def write_scheduler(scheduler: Scheduler) -> dict[str, Any]:
    return write(
        "UnCLIPScheduler",
        SCHEDULER,
        num_train_timesteps=scheduler.schedule.num_timesteps,
        variance_type=_key(LEARNED_VARIANCE, scheduler.learned_variance),
        clip_sample=scheduler.limit is not None,
        clip_sample_range=scheduler.limit or 1.0,
        prediction_type=_key(PREDICTIONS, scheduler.prediction),
    )
