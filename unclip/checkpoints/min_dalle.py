"""DALL-E mini and mega as min-dalle publishes them.

A folder holds vocab.json, merges.txt, encoder.pt, decoder.pt and detoker.pt; mini's names may end in _mini. Or it is
the cache of min-dalle's own code, where detoker.pt lies in the folder vqgan beside.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from unclip.checkpoints import taming
from unclip.checkpoints.pickles import read_state
from unclip.checkpoints.renaming import Rule, build, fuse, move, under
from unclip.checkpoints.store import Bundle
from unclip.files import read_json
from unclip.models.codecs.vqgan import VQGAN
from unclip.models.published.bart_dalle import BartDALLE, BartDALLEConfig
from unclip.tokenizer import BPETokenizer
from unclip.types import CodeOptions

# V text tokens, L of them at most, K codes, N of a picture, C width

HEAD_DIM = 64  # of both; tensors don't tell it
MINI_WIDTH = 1024
ENDINGS = ("", "_mini")  # of names in the repository, which holds both
CACHES = ("dalle_bart_mega", "dalle_bart_mini")
DETOKER = "detoker.pt"
OPTIONS = CodeOptions(top_k=256, guidance=16.0)  # min-dalle's own
# Norms before a Linear, trained without a gain: the file need not have one.
WITHOUT_GAIN = re.compile(
    r"(.*\.)?(pre_self_attn_layer_norm|pre_encoder_attn_layer_norm|glu\.ln[01]|final_ln)\.bias"
)

SELF = (
    move("pre_self_attn_layer_norm", "attention.norm"),
    fuse(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "attention.qkv"),
    move("self_attn.out_proj", "attention.out"),
    move("self_attn_layer_norm", "attention.norm_out"),
)
CROSS = (
    move("pre_encoder_attn_layer_norm", "cross.norm"),
    move("encoder_attn.q_proj", "cross.q"),
    fuse(["encoder_attn.k_proj", "encoder_attn.v_proj"], "cross.kv"),
    move("encoder_attn.out_proj", "cross.out"),
    move("encoder_attn_layer_norm", "cross.norm_out"),
)
MLP = (
    move("glu.ln0", "mlp.norm"),
    fuse(["glu.fc0", "glu.fc1"], "mlp.fc1"),
    move("glu.ln1", "mlp.norm_in"),
    move("glu.fc2", "mlp.fc2"),
)


def recognise(path: Path) -> bool:
    return path.is_dir() and _place(path) is not None


def load_bundle(path: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """The folder described above; of mega and mini in one, mega. ValueError or FileNotFoundError if it is not whole."""
    folder, ending = _place(path)
    state = read_halves(folder, ending)
    config = read_config(state, folder)
    codec = read_codec(_detoker(folder), config.grid[0], dtype)
    if config.image_vocab < codec.vocab_size:
        raise ValueError(
            f"{folder}: its decoder knows {config.image_vocab} codes, its codec {codec.vocab_size}"
        )
    rows, config = config.image_vocab + 1, replace(config, image_vocab=codec.vocab_size)
    dalle = build(BartDALLE, config, state, rules(config, rows), folder, dtype)
    parts = {"tokenizer": read_tokenizer(folder, ending, config), "codec": codec, "dalle": dalle}
    name = f"dalle-{'mega' if config.width > MINI_WIDTH else 'mini'}"
    return Bundle("dalle", parts, {}, OPTIONS, name, "Apache-2.0")


def _place(path: Path) -> tuple[Path, str] | None:
    """The folder with the transformer, and how its names end."""
    for folder in (path, *(path / name for name in CACHES)):
        for ending in ENDINGS:
            if all((folder / f"{part}{ending}.pt").is_file() for part in ("encoder", "decoder")):
                return folder, ending
    return None


def _detoker(folder: Path) -> Path:
    places = (folder / DETOKER, folder.parent / "vqgan" / DETOKER)
    if not (found := [file for file in places if file.is_file()]):
        raise FileNotFoundError(
            f"{places[0]} is missing, which draws the codes; kuprel/min-dalle on the Hub has it"
        )
    return found[0]


def read_tokenizer(folder: Path, ending: str, config: BartDALLEConfig) -> BPETokenizer:
    """From vocab.json and merges.txt: BART's byte-level BPE, of lower-cased ASCII letters as in the training."""
    vocab_file, merges_file = folder / f"vocab{ending}.json", folder / f"merges{ending}.txt"
    vocab = read_json(vocab_file)
    if not merges_file.is_file():
        raise FileNotFoundError(f"{merges_file} is missing")
    try:
        lines = merges_file.read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{vocab_file} and {merges_file.name} hold no vocabulary: {error}"
        ) from None
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\x00-\x7f]"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return BPETokenizer(tokenizer, config.context_length)


def states(path: Path) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of each component."""
    folder, ending = _place(path)
    return {"codec": read_state(_detoker(folder)), "dalle": read_halves(folder, ending)}


def read_halves(folder: Path, ending: str) -> dict[str, Tensor]:
    """The tensors of encoder.pt and decoder.pt, which keep no gain of a norm that was trained without."""
    state = {}
    for half in ("encoder", "decoder"):
        state |= {
            f"{half}.{name}": x for name, x in read_state(folder / f"{half}{ending}.pt").items()
        }
    for name in list(state):
        if WITHOUT_GAIN.fullmatch(name):
            state.setdefault(name.removesuffix("bias") + "weight", torch.ones_like(state[name]))
    return state


def read_config(state: Mapping[str, Tensor], source: Path) -> BartDALLEConfig:
    """From the shapes of the tensors; image_vocab counts all rows of the embedding but the start's."""
    try:
        V, C = state["encoder.embed_tokens.weight"].shape
        L, N = (len(state[f"{half}.embed_positions.weight"]) for half in ("encoder", "decoder"))
        return BartDALLEConfig(
            text_vocab=V,
            context_length=L,
            image_vocab=len(state["decoder.embed_tokens.weight"]) - 1,
            grid=(math.isqrt(N), math.isqrt(N)),
            width=C,
            encoder_depth=_depth(state, "encoder"),
            decoder_depth=_depth(state, "decoder"),
            heads=max(1, C // HEAD_DIM),
            mlp_width=len(state["decoder.layers.0.glu.fc0.weight"]),
        )
    except KeyError as error:
        raise ValueError(
            f"{source} holds no DALL-E of min-dalle's: {error.args[0]} is missing"
        ) from None


def _depth(state: Mapping[str, Tensor], half: str) -> int:
    found = (re.match(rf"{half}\.layers\.(\d+)\.", name) for name in state)
    return 1 + max((int(layer[1]) for layer in found if layer), default=0)


def rules(config: BartDALLEConfig, rows: int) -> list[Rule]:
    """rows: of the embedding and of the head there, of which those that no picture needs are left out here."""
    K = config.image_vocab

    def padded(codes: Tensor) -> Tensor:
        return torch.cat([codes, codes.new_zeros(rows - len(codes), config.width)])

    return [
        move("encoder.embed_tokens", "text_emb"),
        move("encoder.embed_positions", "text_positions"),
        move("encoder.layernorm_embedding", "text_norm"),
        *_layers("encoder", config.encoder_depth, [*SELF, *MLP]),
        move("encoder.final_ln", "encoder_norm"),
        # The start follows the codes; min-dalle itself starts from the last code, which is not what was trained.
        Rule(
            ("decoder.embed_tokens.weight",),
            ("code_emb.weight", "start"),
            lambda x: [x[0][:K], x[0][K]],
            lambda x: [padded(torch.cat([x[0], x[1][None]]))],
        ),
        move("decoder.embed_positions", "code_positions"),
        move("decoder.layernorm_embedding", "code_norm"),
        *_layers("decoder", config.decoder_depth, [*SELF, *CROSS, *MLP]),
        move("decoder.final_ln", "decoder_norm"),
        Rule(("decoder.lm_head",), ("code_head",), lambda x: [x[0][:K]], lambda x: [padded(x[0])]),
    ]


def _layers(half: str, depth: int, layer: Sequence[Rule]) -> list[Rule]:
    return [
        rule for i in range(depth) for rule in under(f"{half}.layers.{i}.", f"{half}.{i}.", layer)
    ]


def read_codec(file: Path, side: int, dtype: torch.dtype = torch.float32) -> VQGAN:
    """detoker.pt: the decoder of a VQ-GAN of taming's, but for one name, and for its pictures, which are in [0, 1].

    side: how many codes are in a row.
    """
    state = read_state(file)
    try:
        state["quantize.embedding.weight"] = state.pop("embedding.weight")
        weight, bias = (state[f"decoder.conv_out.{leaf}"] for leaf in ("weight", "bias"))
    except KeyError as error:
        raise ValueError(
            f"{file} is no detokenizer of min-dalle's: {error.args[0]} is missing"
        ) from None
    state |= {"decoder.conv_out.weight": 2 * weight, "decoder.conv_out.bias": 2 * bias.float() - 1}
    config = taming.sizes(state, file)
    config = replace(config, parts="decoder", image_size=side * config.factor)
    return build(VQGAN, config, state, taming.rules(config), file, dtype)
