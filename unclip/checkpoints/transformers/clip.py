"""CLIP in transformers' folder layout, import and export: names, configuration, preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.checkpoints.folders import weights_index
from unclip.checkpoints.renaming import (
    Part,
    Rule,
    fuse,
    import_parts,
    move,
    prefixed,
    read_weights,
    repeated,
    transpose,
)
from unclip.checkpoints.transformers.tokenizer import end_last, read_tokenizer
from unclip.clip import CLIP, CLIPConfig, OpenCLIPTokenizer
from unclip.files import read_json
from unclip.tokenizer import BPETokenizer
from unclip.weights import meta_device

TEXT = (
    move("text_model.embeddings.token_embedding", "token_embedding"),
    move("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    move("text_model.final_layer_norm", "ln_final"),
    transpose("text_projection.weight", "text_projection"),
)
VISION = (
    move("vision_model.embeddings.class_embedding", "class_embedding"),
    move("vision_model.embeddings.patch_embedding", "conv1"),
    move("vision_model.embeddings.position_embedding.weight", "positional_embedding"),
    move("vision_model.pre_layrnorm", "ln_pre"),
    move("vision_model.post_layernorm", "ln_post"),
    transpose("visual_projection.weight", "proj"),
)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BLOCK = (
    move("layer_norm1", "ln_1"),
    fuse([f"{name}.weight" for name in QKV], "attn.in_proj_weight"),
    fuse([f"{name}.bias" for name in QKV], "attn.in_proj_bias"),
    move("self_attn.out_proj", "attn.out_proj"),
    move("layer_norm2", "ln_2"),
    move("mlp.fc1", "mlp.c_fc"),
    move("mlp.fc2", "mlp.c_proj"),
)
CONFIG_FILE, PROCESSOR_FILE = "config.json", "preprocessor_config.json"
# defaults of transformers' classes
_DEFAULTS = {"intermediate_size": 2048, "projection_dim": 512, "num_hidden_layers": 12}
TEXT_DEFAULTS = {
    **_DEFAULTS,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
VISION_DEFAULTS = {
    **_DEFAULTS,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
# settings of open_clip that transformers has an equivalent for -> the values (None: any)
_SHARED: dict[str, tuple[str, ...] | None]
_SHARED = dict.fromkeys(("width", "layers", "mlp_ratio", "norm_kwargs"))
_TEXT_ONLY = dict.fromkeys(("context_length", "vocab_size", "heads", "eos_id", "pad_id"))
TEXT_SUPPORTED = {**_SHARED, **_TEXT_ONLY, "pool_type": ("argmax", "eos")}
_VISION_ONLY = dict.fromkeys(("image_size", "patch_size", "head_width"))
VISION_SUPPORTED = {**_SHARED, **_VISION_ONLY, "pool_type": ("tok",)}
IGNORED = ("*.position_ids",)  # 0, 1, 2, ..., saved by transformers up to version 4.30
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
RESAMPLINGS = {2: "bilinear", 3: "bicubic"}  # as PIL numbers them
EPS = 1e-5
LOGIT_SCALE = 2.6592  # CLIP's initial value: the towers do not hold it, and sampling needs none
FIRST_EOS = 2  # with this eos_token_id, transformers pools at the highest id, as CLIP does


def _blocks(tower: str, depth: int) -> list[Rule]:
    return repeated(tower + ".encoder.layers.{}.", "transformer.resblocks.{}.", depth, BLOCK)


def read_clip(folder: Path, with_images: bool) -> CLIP:
    """Load a folder's text encoder, tokenizer and optionally image encoder as one CLIP."""
    text, vision = folder / "text_encoder", folder / "image_encoder"
    processor = folder / "feature_extractor" / PROCESSOR_FILE
    image_files = (vision / CONFIG_FILE, processor) if with_images else ()
    config = read_config(text / CONFIG_FILE, *image_files)
    tokenizer = read_tokenizer(folder / "tokenizer", config.context_length)
    if tokenizer.vocab_size > (slots := config.model_cfg["text_cfg"]["vocab_size"]):
        sizes = f"{tokenizer.vocab_size} tokens, but the text encoder has {slots}"
        raise ValueError(f"{folder / 'tokenizer'} has {sizes}")
    with meta_device():
        own = CLIP(config, tokenizer).model.state_dict()
    text_rules, vision_rules = rules(config)
    towers = {text: text_rules} | ({vision: vision_rules} if with_images else {})
    parts = [Part(read_weights(part), rules, weights_index(part)) for part, rules in towers.items()]
    tensors = import_parts(own, parts, dict.fromkeys(own, torch.float32), IGNORED)
    return CLIP.from_tensors(
        config, {**tensors, "logit_scale": torch.tensor(LOGIT_SCALE)}, folder, tokenizer
    )


def read_config(
    text_file: Path, vision_file: Path | None = None, processor_file: Path | None = None
) -> CLIPConfig:
    """Convert the configurations of towers and preprocessing to open_clip's.

    Raises ValueError for a setting that open_clip has no equivalent for.
    """
    text, common = _read_tower(text_file, TEXT_DEFAULTS)
    text_cfg = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        **_size(text),
        "heads": text["num_attention_heads"],
    }
    if (end := text.get("eos_token_id", FIRST_EOS)) != FIRST_EOS:
        text_cfg |= {"pool_type": "eos", "eos_id": end}
    if vision_file is None:
        return CLIPConfig({**common, "vision_cfg": None, "text_cfg": text_cfg})
    vision, vision_common = _read_tower(vision_file, VISION_DEFAULTS)
    if vision_common != common:
        pairs = ", ".join(f"{name} {x} and {common[name]}" for name, x in vision_common.items())
        raise ValueError(f"{vision_file} and {text_file} do not fit together: {pairs}")
    if vision.get("num_channels", 3) != 3:
        raise ValueError(f"{vision_file}: num_channels is {vision['num_channels']}; expected 3")
    vision_cfg = {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        **_size(vision),
        "head_width": vision["hidden_size"] // vision["num_attention_heads"],
    }
    preprocess = read_processor(processor_file, vision["image_size"]) if processor_file else {}
    return CLIPConfig({**common, "vision_cfg": vision_cfg, "text_cfg": text_cfg}, preprocess)


def _read_tower(file: Path, defaults: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a tower's settings, and those that both towers must share."""
    config = {**defaults, **read_json(file)}
    for name in defaults:
        if not isinstance(config[name], int):
            raise ValueError(f"{file}: {name} is {config[name]!r}; expected an integer")
    if (activation := config.get("hidden_act", "quick_gelu")) not in ACTIVATIONS:
        raise ValueError(f"{file}: hidden_act is {activation}; expected {' or '.join(ACTIVATIONS)}")
    return config, {"embed_dim": config["projection_dim"], "quick_gelu": ACTIVATIONS[activation]}


def _size(config: dict[str, Any]) -> dict[str, Any]:
    size = {
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
    }
    eps = config.get("layer_norm_eps", EPS)
    return size if eps == EPS else {**size, "norm_kwargs": {"eps": eps}}


def read_processor(file: Path, image_size: int) -> dict[str, Any]:
    """CLIPImageProcessor -> open_clip's preprocess_cfg: shortest edge and crop, or squash."""
    config = read_json(file)
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(name, True):
            raise ValueError(f"{file}: {name} is False, which is not supported")
    size, crop = config.get("size", 224), config.get("crop_size", 224)
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    cropped, whole = {"shortest_edge": image_size}, {"height": image_size, "width": image_size}
    if size == cropped and config.get("do_center_crop", True) and crop == whole:
        mode = "shortest"
    elif size == whole and not (config.get("do_center_crop", True) and crop != whole):
        mode = "squash"
    else:
        raise ValueError(
            f"{file}: size is {size} and crop_size {crop}; expected {cropped} and {whole}"
        )
    if (resample := config.get("resample", 3)) not in RESAMPLINGS:
        raise ValueError(f"{file}: resample is {resample}; expected 3 (bicubic) or 2 (bilinear)")
    stats = {name: config[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in config}
    interpolation = RESAMPLINGS[resample]
    return {"size": image_size, **stats, "interpolation": interpolation, "resize_mode": mode}


def rules(config: CLIPConfig) -> tuple[list[Rule], list[Rule]]:
    """Return the rules of the text tower and of the image tower, [] if there is none.

    They are CLIPTextModelWithProjection and CLIPVisionModelWithProjection in transformers.
    """
    text, vision = config.model_cfg["text_cfg"], config.model_cfg.get("vision_cfg")
    prefix = "text." if config.model_cfg.get("custom_text") else ""
    text_rules = prefixed("", prefix, [*TEXT, *_blocks("text_model", text.get("layers", 12))])
    if not vision:
        return text_rules, []
    blocks = _blocks("vision_model", vision.get("layers", 12))
    return text_rules, prefixed("", "visual.", [*VISION, *blocks])


def reasons_against_text(clip: CLIP) -> list[str]:
    """Return what transformers' CLIPTextModel has no equivalent for."""
    text = clip.config.model_cfg["text_cfg"]
    reasons = _unknown("text_cfg", text, TEXT_SUPPORTED)
    if not isinstance(clip.tokenizer, (BPETokenizer, OpenCLIPTokenizer)):
        reasons.append(f"its tokenizer is a {type(clip.tokenizer).__name__}")
    elif text.get("pool_type") == "eos" and text.get("eos_id", FIRST_EOS) != end_id(clip.tokenizer):
        eos_id = f"text_cfg.eos_id is {text.get('eos_id')}"
        reasons.append(f"its texts end with id {end_id(clip.tokenizer)}, but {eos_id}")
    return reasons


def end_id(tokenizer: BPETokenizer | OpenCLIPTokenizer) -> int:
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.end_id
    return tokenizer.tokenizer.eot_token_id


def reasons_against_vision(clip: CLIP) -> list[str]:
    """Return what transformers' CLIPVisionModel and CLIPImageProcessor have no equivalent for."""
    vision = clip.config.model_cfg.get("vision_cfg")
    if vision is None:
        return ["there is no image tower"]
    reasons = _unknown("vision_cfg", vision, VISION_SUPPORTED)
    if not isinstance(vision.get("layers", 12), int):
        reasons.append("vision_cfg.layers makes it a ResNet")
    if clip.preprocess.resize_mode == "longest":
        reasons.append("images are padded (resize_mode 'longest')")
    return reasons


def _unknown(
    where: str, config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...] | None]
) -> list[str]:
    """List the settings that are on but unknown, or have an unknown value (None: any value)."""
    on = {name: value for name, value in config.items() if value not in (None, False)}
    return [
        f"{where}.{name} is {value!r}"
        for name, value in on.items()
        if name not in known or (known[name] is not None and value not in known[name])
    ]


def for_transformers(clip: CLIP) -> tuple[BPETokenizer | OpenCLIPTokenizer, dict[str, Tensor]]:
    """Return the tokenizer and weights to write.

    transformers cannot pool at a token with id 2, so such an end token is swapped with the last
    token.
    """
    tokenizer, state = clip.tokenizer, clip.model.state_dict()
    assert isinstance(tokenizer, (BPETokenizer, OpenCLIPTokenizer))  # see reasons_against_text
    pools_at_end = clip.config.model_cfg["text_cfg"].get("pool_type") == "eos"
    if pools_at_end and end_id(tokenizer) == FIRST_EOS:
        assert isinstance(tokenizer, BPETokenizer)  # open_clip's own has another end token
        tokenizer, order = end_last(tokenizer)
        name = next(name for name in state if name.endswith("token_embedding.weight"))
        rows = [*order, *range(len(order), len(state[name]))]
        state[name] = state[name][torch.tensor(rows, device=state[name].device)]
    return tokenizer, state


def write_config(clip: CLIP, tokenizer: BPETokenizer | OpenCLIPTokenizer) -> dict[str, Any]:
    """Return the config.json of a CLIPTextModelWithProjection."""
    # open_clip's defaults
    text = {"width": 512, "heads": 8, "layers": 12, **clip.config.model_cfg["text_cfg"]}
    own = isinstance(tokenizer, BPETokenizer)
    return {
        **_tower(clip, "CLIPTextModelWithProjection", "clip_text_model", text, text["heads"]),
        "max_position_embeddings": clip.context_length,
        "vocab_size": text.get("vocab_size", 49408),
        "bos_token_id": tokenizer.start_id if own else tokenizer.tokenizer.sot_token_id,
        "eos_token_id": end_id(tokenizer) if text.get("pool_type") == "eos" else FIRST_EOS,
    }


def write_vision_config(clip: CLIP) -> dict[str, Any]:
    """Return the config.json of a CLIPVisionModelWithProjection."""
    vision = {"width": 768, "head_width": 64, "layers": 12, **clip.config.model_cfg["vision_cfg"]}
    heads = vision["width"] // vision["head_width"]
    return {
        **_tower(clip, "CLIPVisionModelWithProjection", "clip_vision_model", vision, heads),
        "image_size": clip.image_size,
        "patch_size": vision.get("patch_size", 16),
    }


def _tower(
    clip: CLIP, kind: str, model_type: str, cfg: dict[str, Any], heads: int
) -> dict[str, Any]:
    quick_gelu = clip.config.model_cfg.get("quick_gelu", False)
    return {
        "architectures": [kind],
        "model_type": model_type,
        "hidden_size": cfg["width"],
        "intermediate_size": int(cfg["width"] * cfg.get("mlp_ratio", 4)),
        "num_hidden_layers": cfg["layers"],
        "num_attention_heads": heads,
        "projection_dim": clip.emb_dim,
        "hidden_act": next(name for name, quick in ACTIVATIONS.items() if quick == quick_gelu),
        "layer_norm_eps": (cfg.get("norm_kwargs") or {}).get("eps", EPS),
    }


def write_processor(clip: CLIP) -> dict[str, Any]:
    """Return the preprocessor_config.json of a CLIPImageProcessor."""
    cfg, side = asdict(clip.preprocess), clip.image_size
    whole = {"height": side, "width": side}
    squash = cfg["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": whole if squash else {"shortest_edge": side},
        "resample": next(n for n, name in RESAMPLINGS.items() if name == cfg["interpolation"]),
        "do_center_crop": not squash,
        "crop_size": whole,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(cfg["mean"]),
        "image_std": list(cfg["std"]),
    }
