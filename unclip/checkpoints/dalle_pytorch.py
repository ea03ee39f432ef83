"""DALLE-pytorch's `dalle.pt`: transformer and codec in one file; names depend on options."""

# V text tokens, L of them at most, (h, w) grid of codes

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unclip.checkpoints import taming
from unclip.checkpoints.formats import Bundle, Format, States
from unclip.checkpoints.openai import dvae as openai_dvae
from unclip.checkpoints.pickles import read_checkpoint
from unclip.checkpoints.renaming import Part, Rule, build, move, repeated, without_prefix
from unclip.checkpoints.states import rename_plain
from unclip.checkpoints.transformers.tokenizer import clip_tokenizer, open_clip_vocabulary
from unclip.models.codecs.codec import ImageCodec
from unclip.models.dalle.attention import Kind
from unclip.models.dalle.layers import LayerSpec, rotary_angles
from unclip.models.dalle.transformer import DALLE, DALLEConfig
from unclip.models.published.plain_dvae import PlainDVAE, PlainDVAEConfig
from unclip.tokenizer import BPETokenizer
from unclip.types import CodeOptions
from unclip.weights import meta_device

KINDS: dict[str, Kind]
KINDS = {"full": "full", "axial_row": "own_row", "axial_col": "column", "conv_like": "corner"}
KERNEL = 5  # of conv_like; not configurable there
# Wrappers without tensors (shift, cache) hold a branch as `fn`, or `net` if it is reversible.
BRANCH = re.compile(
    r"transformer\.layers\.(layers|blocks)\.(\d+)\.(0|1|f\.net|g\.net)\.((?:fn\.)*)(.+)"
)
ANGLES = "transformer.pos_emb"
TOKENIZER_FILE, CLIP_VOCAB = "tokenizer.json", 49408
IGNORED = (ANGLES, "text_emb.linear.*", "image_emb.linear.*", "logits_mask")
ATTENTION = (
    move("norm", "norm1"),
    move("norm_out", "norm1_out"),
    move("scale", "gain1", lead=2),
    move("to_qkv", "qkv"),
    move("to_out.0", "out"),
)
MLP = (
    move("norm", "norm2"),
    move("norm_out", "norm2_out"),
    move("scale", "gain2", lead=2),
    move("net.0", "fc1"),
    move("net.3", "fc2"),
)


class DALLEFile(NamedTuple):
    """The content of a `dalle.pt`; the tokenizer is separate (`read_tokenizer`)."""

    dalle: DALLE
    codec: ImageCodec


def recognise(path: Path) -> bool:
    """Recognise a .pt file, or a folder with dalle.pt."""
    file = _file(path)
    if file.suffix != ".pt" or not file.is_file():
        return False
    content = read_checkpoint(file)
    return isinstance(content, dict) and {"hparams", "vae_params", "weights"} <= content.keys()


def _file(path: Path) -> Path:
    return path / "dalle.pt" if path.is_dir() else path


def load_bundle(path: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """Load the file and its tokenizer; as there, the default is temperature 1 without top-k."""
    file = _file(path)
    dalle, codec = load(file, dtype)
    tokenizer = read_tokenizer(file, dalle.config)
    parts = {"tokenizer": tokenizer, "codec": codec, "dalle": dalle}
    return Bundle("dalle", parts, {}, CodeOptions(), file.stem, "")


def probe(path: Path) -> States:
    state = rename_plain(read_checkpoint(_file(path))["weights"])
    codec = {name: x for name, x in state.items() if name.startswith("vae.")}
    return {"codec": codec, "dalle": {name: x for name, x in state.items() if name not in codec}}


def read_tokenizer(file: Path, config: DALLEConfig) -> BPETokenizer:
    """Load the tokenizer.json next to the file, or CLIP's, which is DALLE-pytorch's default."""
    own = file.with_name(TOKENIZER_FILE)
    if own.is_file():
        return BPETokenizer.load(own, config.context_length, marked=False)
    if config.text_vocab != CLIP_VOCAB:
        tokens = f"{config.text_vocab} text tokens, not CLIP's {CLIP_VOCAB}"
        raise ValueError(f"{file} has {tokens}; put its tokenizer next to it as {TOKENIZER_FILE}")
    from open_clip import SimpleTokenizer  # late: slow to import

    tokenizer = clip_tokenizer(*open_clip_vocabulary(SimpleTokenizer()), special=[])
    return BPETokenizer(tokenizer, config.context_length, marked=False)


def load(path: Path, dtype: torch.dtype = torch.float32) -> DALLEFile:
    """Load transformer and codec, in eval mode. Raises ValueError for unsupported options."""
    content = read_checkpoint(path)
    weights = rename_plain(content["weights"])
    state = {name: x for name, x in weights.items() if not name.startswith("vae.")}
    config = read_config(state, content["hparams"], path)
    part = Part(plain_names(state, config), rules(config), path)
    dalle = build(DALLE, config, [part], dtype, IGNORED)
    codec = build_codec(without_prefix(weights, "vae."), content["vae_params"], path, dtype)
    config.check_codec(codec.vocab_size, codec.grid)
    return DALLEFile(dalle, codec)


def read_config(
    state: Mapping[str, Tensor], hparams: Mapping[str, Any], source: str | Path
) -> DALLEConfig:
    """Infer the configuration from the tensors, and from hparams what they do not reveal."""
    branches = [found.groups() for name in state if (found := BRANCH.fullmatch(name))]
    kinds = hparams.get("attn_types") or ("full",)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"{source}: attn_type is {unknown[0]!r}; expected {' or '.join(KINDS)}")
    V, L = hparams["num_text_tokens"], hparams["text_seq_len"]
    learned = "text_pos_emb.weight" in state
    if learned:
        grid = state["image_pos_emb.weights.0"].shape[1], state["image_pos_emb.weights.1"].shape[2]
    else:
        side = math.isqrt(state[ANGLES].shape[1] - L - 1)
        grid = side, side
    # LayerScale and PreNorm wrap every MLP; a third wrapper shifts tokens.
    mlps = [wrappers for *_, wrappers, rest in branches if rest.startswith("net.0.")]
    shift = any(wrappers.count("fn.") > 2 for wrappers in mlps)
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
            shift=shift,
        ),
        positions="learned" if learned else "rotary",
        reversible=any(kind == "blocks" for kind, *_ in branches),
    )
    if not learned:
        angles = rotary_angles(L + 1, grid, config.head_dim)
        if not torch.allclose(state[ANGLES][0].float(), angles):
            raise ValueError(f"{source} has other rotary angles than DALLE-pytorch 1.6 computes")
    return config


def plain_names(state: Mapping[str, Tensor], config: DALLEConfig) -> dict[str, Tensor]:
    """Remove wrappers from names (layers.0.attention.to_qkv.weight); untie embeddings and head."""
    plain = {}
    for name, tensor in state.items():
        if found := BRANCH.fullmatch(name):
            _, layer, branch, _, rest = found.groups()
            name = f"layers.{layer}.{'attention' if branch in ('0', 'f.net') else 'mlp'}.{rest}"
        plain[name] = tensor
    if "text_emb.weight" not in plain:
        sizes = [config.text_vocab + config.context_length, config.image_vocab]
        text, image = plain["to_logits.1.weight"].split(sizes)
        plain |= {"text_emb.weight": text, "image_emb.weight": image}
    return plain


def rules(config: DALLEConfig) -> list[Rule]:
    """DALLE-pytorch's DALLE -> DALLE, for plain names."""
    text = config.text_vocab + config.context_length

    def with_start(x: Iterable[Tensor]) -> list[Tensor]:
        emb, start = x
        return [torch.cat([start[None], emb[1:]])]

    return [
        # Text id 0 is padding there, and its row is the start token's.
        Rule(
            ("text_emb.weight",),
            ("text_emb.weight", "start"),
            lambda x: [x[0], x[0][0]],
            with_start,
        ),
        move("image_emb", "code_emb"),
        move("text_pos_emb", "text_positions"),
        _axis("image_pos_emb.weights.0", "rows.weight", (1, -1, 1, config.width)),
        _axis("image_pos_emb.weights.1", "columns.weight", (1, 1, -1, config.width)),
        *repeated("layers.{}.attention.", "layers.{}.", config.depth, ATTENTION),
        *repeated("layers.{}.mlp.", "layers.{}.", config.depth, MLP),
        move("to_logits.0", "norm"),
        Rule(
            ("to_logits.1",),
            ("text_head", "code_head"),
            lambda x: x[0].split([text, len(x[0]) - text]),
            lambda x: [torch.cat(list(x))],
        ),
    ]


def _axis(foreign: str, ours: str, shape: tuple[int, ...]) -> Rule:
    """Positions along one axis of the grid: `shape` there, (size, C) here."""
    return Rule(
        (foreign,), (ours,), lambda x: [x[0].flatten(0, -2)], lambda x: [x[0].reshape(shape)]
    )


def build_codec(
    state: Mapping[str, Tensor],
    params: Mapping[str, Any] | None,
    source: str | Path,
    dtype: torch.dtype,
) -> ImageCodec:
    """Build the codec in the file: DALLE-pytorch's own, OpenAI's dVAE, or a VQGAN of taming's."""
    if params is not None:
        config = read_plain_dvae(params)
        return build(PlainDVAE, config, [Part(state, plain_dvae_rules(config), source)], dtype)
    if any(name.startswith("enc.blocks.") for name in state):
        state = {f"{name[:3]}oder.{name[4:]}": tensor for name, tensor in state.items()}
        return openai_dvae.build_dvae(state, source, dtype)
    if any(name.startswith("model.quantize.") for name in state):
        state = without_prefix(state, "model.")
        return taming.build_vqgan(state, taming.infer_config(state, source), source, dtype)
    raise ValueError(f"{source} has no vae_params and no tensors of a known codec")


def read_plain_dvae(params: Mapping[str, Any]) -> PlainDVAEConfig:
    """Convert the arguments of DALLE-pytorch's DiscreteVAE to a config."""
    means, deviations = params.get("normalization", ((0.5,) * 3,) * 2) or ((0.0,) * 3, (1.0,) * 3)
    return PlainDVAEConfig(
        image_size=params.get("image_size", 256),
        vocab_size=params.get("num_tokens", 512),
        code_width=params.get("codebook_dim", 512),
        halvings=params.get("num_layers", 3),
        blocks=params.get("num_resnet_blocks", 0),
        width=params.get("hidden_dim", 64),
        mean=(means[0], means[1], means[2]),
        deviation=(deviations[0], deviations[1], deviations[2]),
        smooth_l1=params.get("smooth_l1_loss", False),
    )


def plain_dvae_rules(config: PlainDVAEConfig) -> list[Rule]:
    """DiscreteVAE -> PlainDVAE: all names are the same."""
    with meta_device():
        names = PlainDVAE(config).state_dict()
    return [move(name, name) for name in names]


FORMAT = Format("DALLE-pytorch", "dalle", recognise, load_bundle, probe)
