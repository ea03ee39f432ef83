"""DALL-E mini and mega as min-dalle publishes them.

A folder has vocab.json, merges.txt, encoder.pt, decoder.pt and detoker.pt; file names of mini
may end in _mini. The cache of min-dalle's own code is read too; there detoker.pt is in the sibling
folder vqgan.
"""

# V text tokens, L of them at most, K codes, N codes per image, C width

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from unclip.checkpoints import taming
from unclip.checkpoints.formats import Bundle, Format, States
from unclip.checkpoints.renaming import Part, Rule, build, count, expecting, fuse, move, repeated
from unclip.checkpoints.states import read_state
from unclip.checkpoints.transformers.tokenizer import read_merges
from unclip.files import read_json
from unclip.models.codecs.vqgan import VQGAN
from unclip.models.published.bart_dalle import BartDALLE, BartDALLEConfig
from unclip.tokenizer import BPETokenizer
from unclip.types import CodeOptions

HEAD_DIM = 64  # of both models; tensors do not reveal it
MINI_WIDTH = 1024
ENDINGS = ("", "_mini")  # of file names in the repository, which holds both models
CACHES = ("dalle_bart_mega", "dalle_bart_mini")
DETOKER = "detoker.pt"
OPTIONS = CodeOptions(top_k=256, guidance=16.0)  # the defaults of min-dalle
# Norms in front of a Linear, trained without a gain: the file need not have one.
WITHOUT_GAIN = re.compile(
    r"(.*\.)?(pre_self_attn_layer_norm|pre_encoder_attn_layer_norm|glu\.ln[01]|final_ln)\.bias"
)

SELF_ATTENTION = (
    move("pre_self_attn_layer_norm", "attention.norm"),
    fuse(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "attention.qkv"),
    move("self_attn.out_proj", "attention.out"),
    move("self_attn_layer_norm", "attention.norm_out"),
)
CROSS_ATTENTION = (
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
    return _place(path) is not None


def load_bundle(path: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    """Load the folder, or mega if it has both.

    Raises ValueError or FileNotFoundError if it is incomplete.
    """
    folder, ending = _require_place(path)
    state = read_halves(folder, ending)
    config = infer_config(state, folder)
    codec = read_codec(_detoker(folder), config.grid[0], dtype)
    if config.image_vocab < codec.vocab_size:
        expected = f"expected at least the codec's {codec.vocab_size}"
        raise ValueError(f"{folder}: the decoder has {config.image_vocab} codes; {expected}")
    rows, config = config.image_vocab + 1, replace(config, image_vocab=codec.vocab_size)
    dalle = build(BartDALLE, config, [Part(state, rules(config, rows), folder)], dtype)
    parts = {"tokenizer": read_tokenizer(folder, ending, config), "codec": codec, "dalle": dalle}
    name = f"dalle-{'mega' if config.width > MINI_WIDTH else 'mini'}"
    return Bundle("dalle", parts, {}, OPTIONS, name, "Apache-2.0")


def probe(path: Path) -> States:
    folder, ending = _require_place(path)
    return {"codec": read_state(_detoker(folder)), "dalle": read_halves(folder, ending)}


def _place(path: Path) -> tuple[Path, str] | None:
    """Return the folder with the transformer and the ending of its file names."""
    for folder in (path, *(path / name for name in CACHES)):
        for ending in ENDINGS:
            if all((folder / f"{half}{ending}.pt").is_file() for half in ("encoder", "decoder")):
                return folder, ending
    return None


def _require_place(path: Path) -> tuple[Path, str]:
    place = _place(path)
    assert place is not None, f"{path} is not recognised"
    return place


def _detoker(folder: Path) -> Path:
    files = (folder / DETOKER, folder.parent / "vqgan" / DETOKER)
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(f"{files[0]} is missing; kuprel/min-dalle on the Hub has it")


def read_tokenizer(folder: Path, ending: str, config: BartDALLEConfig) -> BPETokenizer:
    """Load BART's byte-level BPE for lower-case ASCII text, as in training."""
    vocab_file, merges_file = folder / f"vocab{ending}.json", folder / f"merges{ending}.txt"
    vocab, merges = read_json(vocab_file), read_merges(merges_file)
    try:
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    except Exception as error:  # the library raises nothing narrower
        fault = f"{vocab_file} and {merges_file.name} are not a vocabulary: {error}"
        raise ValueError(fault) from None
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


def read_halves(folder: Path, ending: str) -> dict[str, Tensor]:
    """Read encoder.pt and decoder.pt; norms trained without a gain get one of ones."""
    state = {
        f"{half}.{name}": x
        for half in ("encoder", "decoder")
        for name, x in read_state(folder / f"{half}{ending}.pt").items()
    }
    for name in filter(WITHOUT_GAIN.fullmatch, list(state)):
        state.setdefault(name.removesuffix("bias") + "weight", torch.ones_like(state[name]))
    return state


def infer_config(state: Mapping[str, Tensor], source: Path) -> BartDALLEConfig:
    """Infer the sizes from the tensors; image_vocab does not count the start token's row."""
    with expecting("a DALL-E of min-dalle", source):
        V, C = state["encoder.embed_tokens.weight"].shape
        L, N = (len(state[f"{half}.embed_positions.weight"]) for half in ("encoder", "decoder"))
        encoder_depth, decoder_depth = (
            max(1, count(state, rf"{half}\.layers\.(\d+)\.")) for half in ("encoder", "decoder")
        )
        return BartDALLEConfig(
            text_vocab=V,
            context_length=L,
            image_vocab=len(state["decoder.embed_tokens.weight"]) - 1,
            grid=(math.isqrt(N), math.isqrt(N)),
            width=C,
            encoder_depth=encoder_depth,
            decoder_depth=decoder_depth,
            heads=max(1, C // HEAD_DIM),
            mlp_width=len(state["decoder.layers.0.glu.fc0.weight"]),
        )


def rules(config: BartDALLEConfig, rows: int) -> list[Rule]:
    """DalleBartEncoder and DalleBartDecoder -> BartDALLE.

    rows: of the embedding and the head in the file; those beyond the codec's codes are dropped.
    """
    K = config.image_vocab

    def padded(codes: Tensor, *last: Tensor) -> Tensor:
        missing = rows - len(codes) - len(last)
        return torch.cat([codes, codes.new_zeros(missing, config.width), *last])

    encoder, decoder = [*SELF_ATTENTION, *MLP], [*SELF_ATTENTION, *CROSS_ATTENTION, *MLP]
    return [
        move("encoder.embed_tokens", "text_emb"),
        move("encoder.embed_positions", "text_positions"),
        move("encoder.layernorm_embedding", "text_norm"),
        *repeated("encoder.layers.{}.", "encoder.{}.", config.encoder_depth, encoder),
        move("encoder.final_ln", "encoder_norm"),
        # The start token is the last row, as in training; mega has unused rows between the codes
        # and it. min-dalle uses the last code instead.
        Rule(
            ("decoder.embed_tokens.weight",),
            ("code_emb.weight", "start"),
            lambda x: [x[0][:K], x[0][-1]],
            lambda x: [padded(x[0], x[1][None])],
        ),
        move("decoder.embed_positions", "code_positions"),
        move("decoder.layernorm_embedding", "code_norm"),
        *repeated("decoder.layers.{}.", "decoder.{}.", config.decoder_depth, decoder),
        move("decoder.final_ln", "decoder_norm"),
        Rule(("decoder.lm_head",), ("code_head",), lambda x: [x[0][:K]], lambda x: [padded(x[0])]),
    ]


def read_codec(file: Path, side: int, dtype: torch.dtype = torch.float32) -> VQGAN:
    """Load detoker.pt: the decoder of a VQGAN of taming's, except that its images are in [0, 1].

    side: codes per row of the grid.
    """
    state = read_state(file)
    with expecting("a detokenizer of min-dalle", file):
        state["quantize.embedding.weight"] = state.pop("embedding.weight")
        weight, bias = (state[f"decoder.conv_out.{leaf}"] for leaf in ("weight", "bias"))
    state |= {"decoder.conv_out.weight": 2 * weight, "decoder.conv_out.bias": 2 * bias.float() - 1}
    config = taming.infer_config(state, file)
    config = replace(config, parts="decoder", image_size=side * config.factor)
    return build(VQGAN, config, [Part(state, taming.rules(config), file)], dtype)


FORMAT = Format("min-dalle", "dalle", recognise, load_bundle, probe)
