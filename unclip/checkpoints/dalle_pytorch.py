"""DALLE-pytorch's `dalle.pt`: transformer and codec in one file, its names bent by the options of its training."""

# V text tokens, L of them at most, h w grid of codes

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.checkpoints import taming
from unclip.checkpoints.openai import dvae as openai_dvae
from unclip.checkpoints.pickles import read_checkpoint
from unclip.checkpoints.renaming import Rule, build, move, under
from unclip.checkpoints.store import Bundle
from unclip.checkpoints.transformers.tokenizer import clip_tokenizer, open_clip_vocabulary
from unclip.models.codecs.codec import ImageCodec
from unclip.models.codecs.dvae import DVAE
from unclip.models.codecs.vqgan import VQGAN
from unclip.models.dalle.attention import Kind
from unclip.models.dalle.layers import LayerSpec
from unclip.models.dalle.rotary import rotary_angles
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.models.published.plain_dvae import PlainDVAE, PlainDVAEConfig
from unclip.tokenizer import BPETokenizer
from unclip.types import CodeOptions

KINDS: dict[str, Kind] = {
    "full": "full",
    "axial_row": "own_row",
    "axial_col": "column",
    "conv_like": "corner",
}
KERNEL = 5  # of conv_like, fixed there
# A branch stands in wrappers (reversible, shift, cache) which hold nothing: they are called fn, a reversible one net.
BRANCH = re.compile(
    r"transformer\.layers\.(layers|blocks)\.(\d+)\.(0|1|f\.net|g\.net)\.((?:fn\.)*)(.+)"
)
ANGLES = "transformer.pos_emb"
TOKENIZER_FILE, CLIP_VOCAB = "tokenizer.json", 49408
IGNORED = (ANGLES, "text_emb.linear.*", "image_emb.linear.*", "logits_mask")


@dataclass(frozen=True)
class DALLEFile:
    """What a `dalle.pt` holds. Its tokenizer is not in it (`read_tokenizer`)."""

    dalle: DALLE
    codec: ImageCodec


def recognise(path: Path) -> bool:
    """A file, or a folder with dalle.pt."""
    path = _file(path)
    if path.suffix != ".pt" or not path.is_file():
        return False
    content = read_checkpoint(path)
    return isinstance(content, dict) and {"hparams", "vae_params", "weights"} <= content.keys()


def _file(path: Path) -> Path:
    return path / "dalle.pt" if path.is_dir() else path


def load_bundle(path: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """The file with its tokenizer, drawing as DALLE-pytorch does: at temperature 1, from all codes."""
    file = _file(path)
    content = load(file, dtype)
    tokenizer = read_tokenizer(file, content.dalle.config)
    parts = {"tokenizer": tokenizer, "codec": content.codec, "dalle": content.dalle}
    return Bundle("dalle", parts, {}, CodeOptions(), file.stem, "")


def read_tokenizer(file: Path, config: DALLEConfig) -> BPETokenizer:
    """The tokenizer.json beside the file, or else CLIP's, which DALLE-pytorch takes if it is not told otherwise."""
    if (beside := file.with_name(TOKENIZER_FILE)).is_file():
        return BPETokenizer.load(beside, config.context_length, marked=False)
    if config.text_vocab != CLIP_VOCAB:
        raise ValueError(
            f"{file} was trained on texts of {config.text_vocab} tokens and does not hold its tokenizer; put it beside "
            f"as {TOKENIZER_FILE}"
        )
    from open_clip import SimpleTokenizer  # late: it is slow to import

    tokenizer = clip_tokenizer(*open_clip_vocabulary(SimpleTokenizer()), special=[])
    return BPETokenizer(tokenizer, config.context_length, marked=False)


def load(path: Path, dtype: torch.dtype = torch.float32) -> DALLEFile:
    """Transformer and codec of a file, in eval mode; ValueError for options that are unknown here."""
    content = read_checkpoint(path)
    hparams, weights = content["hparams"], content["weights"]
    of_codec = {
        name.removeprefix("vae."): x for name, x in weights.items() if name.startswith("vae.")
    }
    of_dalle = {name: x for name, x in weights.items() if not name.startswith("vae.")}
    config = read_config(of_dalle, hparams, path)
    dalle = build(DALLE, config, plain_names(of_dalle, config), rules(config), path, dtype, IGNORED)
    codec = build_codec(of_codec, content["vae_params"], path, dtype)
    config.check_codec(codec.vocab_size, codec.grid)
    return DALLEFile(dalle, codec)


def read_config(
    state: Mapping[str, Tensor], hparams: Mapping[str, Any], source: str | Path
) -> DALLEConfig:
    """From the names and shapes of the transformer's tensors, and from hparams what they don't tell."""
    branches = [found.groups() for name in state if (found := BRANCH.fullmatch(name))]
    kinds = hparams.get("attn_types") or ("full",)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(
            f"{source} has attention of kind {unknown[0]!r}; those known are {', '.join(KINDS)}"
        )
    V, L = hparams["num_text_tokens"], hparams["text_seq_len"]
    learned = "text_pos_emb.weight" in state
    if learned:
        grid = state["image_pos_emb.weights.0"].shape[1], state["image_pos_emb.weights.1"].shape[2]
    else:
        side = math.isqrt(state[ANGLES].shape[1] - L - 1)
        grid = side, side
    config = DALLEConfig(
        text_vocab=V,
        context_length=L,
        image_vocab=len(state["to_logits.1.weight"]) - V - L,
        grid=grid,
        width=hparams["dim"],
        depth=hparams["depth"],
        heads=hparams.get("heads", 8),
        head_dim=hparams.get("dim_head", 64),
        attention=tuple(KINDS[kind] for kind in kinds),
        last_attention=None,
        kernel=KERNEL,
        layer=LayerSpec(
            mlp="geglu",
            qkv_bias=False,
            gain=1.0,
            sandwich=any(rest.startswith("norm_out.") for *_, rest in branches),
            shift=any(
                rest.startswith("net.0.") and len(wraps) > 2 * len("fn.")
                for *_, wraps, rest in branches
            ),
        ),
        positions="learned" if learned else "rotary",
        reversible=any(kind == "blocks" for kind, *_ in branches),
    )
    if not learned and not torch.allclose(
        state[ANGLES][0].float(), rotary_angles(L + 1, grid, config.head_dim)
    ):
        raise ValueError(
            f"{source} turns its rotary positions by other angles than DALLE-pytorch 1.6"
        )
    return config


def plain_names(state: Mapping[str, Tensor], config: DALLEConfig) -> dict[str, Tensor]:
    """Without wrappers: layers.0.attention.to_qkv.weight. Embeddings that were rows of the head stand alone."""
    plain = {}
    for name, tensor in state.items():
        if found := BRANCH.fullmatch(name):
            _, layer, branch, _, rest = found.groups()
            name = f"layers.{layer}.{'attention' if branch in ('0', 'f.net') else 'mlp'}.{rest}"
        plain[name] = tensor
    if "text_emb.weight" not in plain:
        sizes = [config.text_vocab + config.context_length, config.image_vocab]
        plain["text_emb.weight"], plain["image_emb.weight"] = plain["to_logits.1.weight"].split(
            sizes
        )
    return plain


def rules(config: DALLEConfig) -> list[Rule]:
    """For plain names."""
    attention = [
        *(move("norm", "norm1"), move("norm_out", "norm1_out"), move("scale", "gain1", lead=2)),
        *(move("to_qkv", "qkv"), move("to_out.0", "out")),
    ]
    mlp = [
        *(move("norm", "norm2"), move("norm_out", "norm2_out"), move("scale", "gain2", lead=2)),
        *(move("net.0", "fc1"), move("net.3", "fc2")),
    ]
    text = config.text_vocab + config.context_length
    return [
        # There a text's id 0 is padding, so its row is that of the start.
        Rule(
            ("text_emb.weight",),
            ("text_emb.weight", "start"),
            lambda x: [x[0], x[0][0]],
            _with_start,
        ),
        move("image_emb", "code_emb"),
        move("text_pos_emb", "text_positions"),
        _axis("image_pos_emb.weights.0", "rows.weight", (1, -1, 1, config.width)),
        _axis("image_pos_emb.weights.1", "columns.weight", (1, 1, -1, config.width)),
        *(
            rule
            for i in range(config.depth)
            for rule in under(f"layers.{i}.attention.", f"layers.{i}.", attention)
        ),
        *(
            rule
            for i in range(config.depth)
            for rule in under(f"layers.{i}.mlp.", f"layers.{i}.", mlp)
        ),
        move("to_logits.0", "norm"),
        Rule(
            ("to_logits.1",),
            ("text_head", "code_head"),
            lambda x: x[0].split([text, len(x[0]) - text]),
            lambda x: [torch.cat(list(x))],
        ),
    ]


def _with_start(x: Iterable[Tensor]) -> list[Tensor]:
    emb, start = x
    return [torch.cat([start[None], emb[1:]])]


def _axis(there: str, here: str, shape: tuple[int, ...]) -> Rule:
    """Positions (size, C) that have an axis of length 1 for each axis of the stream but their own there."""
    return Rule(
        (there,),
        (here,),
        lambda x: [x[0].reshape(-1, x[0].shape[-1])],
        lambda x: [x[0].reshape(shape)],
    )


def build_codec(
    state: Mapping[str, Tensor],
    params: Mapping[str, Any] | None,
    source: str | Path,
    dtype: torch.dtype,
) -> ImageCodec:
    """The codec in the file: DALLE-pytorch's own, OpenAI's dVAE, or a VQ-GAN of taming-transformers."""
    if params is not None:
        config = read_plain_dvae(params)
        return build(PlainDVAE, config, state, plain_dvae_rules(config), source, dtype)
    if any(name.startswith("enc.blocks.") for name in state):
        state = {f"{name[:3]}oder.{name[4:]}": tensor for name, tensor in state.items()}
        config = openai_dvae.sizes(state, source)
        with torch.device("meta"):
            names = DVAE(config).state_dict()
        return build(DVAE, config, state, openai_dvae.rules(names), source, dtype)
    if any(name.startswith("model.quantize.") for name in state):
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        config = taming.sizes(state, source)
        return build(VQGAN, config, state, taming.rules(config), source, dtype, taming.IGNORED)
    raise ValueError(
        f"{source} holds no codec: its vae_params are empty, and it has no weights of a known one"
    )


def read_plain_dvae(params: Mapping[str, Any]) -> PlainDVAEConfig:
    """A config of the arguments that DALLE-pytorch made its DiscreteVAE from."""
    means, deviations = params.get("normalization", ((0.5,) * 3,) * 2) or ((0.0,) * 3, (1.0,) * 3)
    return PlainDVAEConfig(
        image_size=params.get("image_size", 256),
        vocab_size=params.get("num_tokens", 512),
        code_width=params.get("codebook_dim", 512),
        halvings=params.get("num_layers", 3),
        blocks=params.get("num_resnet_blocks", 0),
        width=params.get("hidden_dim", 64),
        mean=tuple(means[:3]),
        deviation=tuple(deviations[:3]),
        smooth_l1=params.get("smooth_l1_loss", False),
    )


def plain_dvae_rules(config: PlainDVAEConfig) -> list[Rule]:
    with torch.device("meta"):
        names = PlainDVAE(config).state_dict()
    return [move(name, name) for name in names]
