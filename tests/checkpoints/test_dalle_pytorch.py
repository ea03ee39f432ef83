"""DALLE-pytorch's files load, and outputs match recordings of the original code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import numbers, recording, sampled, weights
from tokenizers import Tokenizer, models, pre_tokenizers

import unclip
from unclip.checkpoints.dalle_pytorch import (
    DALLEFile,
    load,
    plain_names,
    read_config,
    read_tokenizer,
    recognise,
    rules,
)
from unclip.checkpoints.renaming import export_state
from unclip.checkpoints.store import load_component, save_component
from unclip.checkpoints.taming import rules as taming_rules
from unclip.models.codecs.dvae import DVAE, DVAEConfig
from unclip.models.codecs.vqgan import VQGAN, VQGANConfig
from unclip.models.dalle.layers import rotary_angles
from unclip.models.dalle.transformer import DALLEConfig
from unclip.models.unet import LevelSpec
from unclip.types import CodeOptions

RECORDED = recording("dalle_pytorch")
VARIANTS = RECORDED["variants"]
TEXT = torch.tensor([[3, 17, 9, 0, 0], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]])
CODES = (torch.arange(48).view(3, 16) * 7 + torch.arange(3)[:, None]) % 11


def content(variant: str) -> dict[str, Any]:
    """A dalle.pt as DALLE-pytorch saves it, with the weights of the recording."""
    recorded = VARIANTS[variant]
    state = weights(recorded["shapes"])
    if recorded["hparams"]["rotary_emb"]:
        state["transformer.pos_emb"] = rotary_angles(6, (4, 4), recorded["hparams"]["dim_head"])[
            None
        ].clone()
    return {
        "hparams": recorded["hparams"],
        "vae_params": RECORDED["vae_params"],
        "weights": state,
        "version": "1.6.6",
        "vae_class_name": "DiscreteVAE",
    }


def loaded(folder: Path, saved: dict[str, Any]) -> DALLEFile:
    torch.save(saved, folder / "dalle.pt")
    assert recognise(folder / "dalle.pt")
    return load(folder / "dalle.pt")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_dalle_pytorch(variant, tmp_path):
    recorded, dalle = VARIANTS[variant], loaded(tmp_path, content(variant)).dalle
    tokens = dalle.tokens(TEXT, TEXT != 0)  # id 0 is padding in DALLE-pytorch
    with torch.no_grad():
        logits = dalle(tokens, CODES)
        text, codes = dalle.log_likelihood(tokens, CODES)
    assert sampled(logits.text) == pytest.approx(recorded["text_logits"], rel=0, abs=1e-5)
    assert sampled(logits.codes) == pytest.approx(recorded["code_logits"], rel=0, abs=1e-5)
    assert -(text.mean() + 7 * codes.mean()) / 8 == pytest.approx(recorded["loss"], abs=1e-5)
    if "angles" in recorded:
        angles = rotary_angles(6, (4, 4), recorded["hparams"]["dim_head"])
        assert sampled(angles) == pytest.approx(recorded["angles"], rel=1e-5)


def test_the_codec_matches_dalle_pytorch(tmp_path):
    recorded, codec = VARIANTS["full"], loaded(tmp_path, content("full")).codec
    pixels = (
        numbers("picture", (2, 3, 32, 32), 0.3).clamp(-0.5, 0.5) + 0.5
    )  # [0, 1] in DALLE-pytorch
    assert codec.encode(2 * pixels - 1).flatten(1).tolist() == recorded["codes_of_picture"]
    assert sampled(codec.decode(CODES.view(3, 4, 4))) == pytest.approx(
        recorded["picture_of_codes"], abs=1e-5
    )


def test_the_codec_can_be_trained(tmp_path):
    codec = loaded(tmp_path, content("full")).codec.train()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    terms = codec(images, temperature=0.5, kl_weight=0.1)
    terms.loss.backward()
    assert codec.encoder[0][0].weight.grad.any() and terms.reconstruction.shape == images.shape
    assert codec.log_likelihood(images, codec.encode(images)).shape == (2,)
    save_component(codec, tmp_path / "codec")
    again = load_component(tmp_path / "codec")
    assert torch.equal(again.reconstruct(images), codec.reconstruct(images))


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_inverts_import(variant, tmp_path):
    saved = content(variant)
    dalle = loaded(tmp_path, saved).dalle
    of_dalle = {name: x for name, x in saved["weights"].items() if not name.startswith("vae.")}
    foreign = plain_names(of_dalle, read_config(of_dalle, saved["hparams"], "here"))
    foreign.pop("transformer.pos_emb", None)
    back = export_state(dalle.state_dict(), rules(dalle.config))
    assert back.keys() == foreign.keys()
    assert all(torch.equal(back[name], foreign[name]) for name in back)


def test_embeddings_tied_to_the_head_are_loaded(tmp_path):
    saved = content("full")
    state = saved["weights"]
    text, codes = (state.pop(f"{kind}_emb.weight") for kind in ("text", "image"))
    state["to_logits.1.weight"] = state["text_emb.linear.weight"] = torch.cat([text, codes])
    dalle = loaded(tmp_path, saved).dalle
    assert torch.equal(dalle.text_emb.weight, text) and torch.equal(dalle.code_emb.weight, codes)
    assert torch.equal(dalle.text_head.weight, text) and torch.equal(dalle.start, text[0])


def test_files_with_openai_s_or_taming_s_codec_are_loaded(tmp_path):
    saved = content("full")
    of_dalle = {name: x for name, x in saved["weights"].items() if not name.startswith("vae.")}
    torch.manual_seed(0)
    dvae = DVAE(
        DVAEConfig(image_size=256, vocab_size=11, width=8, groups=7, blocks=1, code_width=8)
    )
    theirs = {f"vae.{name[:3]}.blocks.{name[8:]}": x for name, x in dvae.state_dict().items()}
    codec = loaded(tmp_path, {**saved, "vae_params": None, "weights": {**of_dalle, **theirs}}).codec
    assert isinstance(codec, DVAE) and torch.equal(codec.encoder.input.w, dvae.encoder.input.w)

    levels = tuple(LevelSpec(32, 1, False) for _ in range(7))
    vqgan = VQGAN(VQGANConfig(vocab_size=11, code_width=8, levels=levels, feature_width=8))
    theirs = {
        f"vae.model.{name}": x
        for name, x in export_state(vqgan.state_dict(), taming_rules(vqgan.config)).items()
    }
    codec = loaded(tmp_path, {**saved, "vae_params": None, "weights": {**of_dalle, **theirs}}).codec
    assert isinstance(codec, VQGAN) and torch.equal(
        codec.quantizer.codebook, vqgan.quantizer.codebook
    )


def test_prefixes_of_wrappers_are_removed(tmp_path):
    saved = content("full")
    plain = loaded(tmp_path, saved).dalle.state_dict()
    plain = {name: x.clone() for name, x in plain.items()}  # they are mapped from the file
    saved["weights"] = {f"module.{name}": x for name, x in saved["weights"].items()}
    wrapped = loaded(tmp_path, saved).dalle.state_dict()
    assert all(torch.equal(x, wrapped[name]) for name, x in plain.items())


def test_a_file_uses_the_tokenizer_next_to_it(tmp_path):
    torch.save(content("full"), tmp_path / "dalle.pt")
    with pytest.raises(
        ValueError, match="20 text tokens.*put its tokenizer next to it as tokenizer"
    ):
        unclip.load(tmp_path / "dalle.pt", "cpu")
    words = ["[UNK]", *"a red apple blue fish".split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pipe = unclip.load(tmp_path / "dalle.pt", "cpu")
    assert (pipe.kind, pipe.name, pipe.options) == ("dalle", "dalle", CodeOptions())
    tokens = pipe._tokens(["a blue fish", "", None])
    assert tokens[0].tolist() == [1, 4, 5, 23, 24] and torch.equal(
        tokens[1:], pipe.dalle.null_tokens(2)
    )
    result = unclip.load(tmp_path, "cpu")("a blue fish", seed=1, progress=False)
    assert result.images[0].size == (32, 32)
    assert result.codes.tolist() == pipe("a blue fish", seed=1, progress=False).codes.tolist()


def test_the_default_tokenizer_is_clip_s(tmp_path):
    config = DALLEConfig(49408, 5, 11, (4, 4), width=8, depth=1, heads=1)
    tokenizer = read_tokenizer(tmp_path / "dalle.pt", config)
    assert tokenizer.vocab_size == 49408
    assert tokenizer(["a Red apple"])[0].tolist() == [[320, 736, 3055, 0, 0]]


def test_unsupported_files_are_refused(tmp_path):
    saved = content("full")
    with pytest.raises(ValueError, match=r"attn_type is 'sparse'; expected full or axial_row"):
        loaded(
            tmp_path, {**saved, "hparams": {**saved["hparams"], "attn_types": ("full", "sparse")}}
        )
    with pytest.raises(ValueError, match="no tensors of a known codec"):
        loaded(tmp_path, {**saved, "vae_params": None})
    with pytest.raises(ValueError, match=r"missing: layers\.2\.attention\.norm\.weight"):
        loaded(tmp_path, {**saved, "hparams": {**saved["hparams"], "depth": 3}})
    turned = content("rotary_emb")
    turned["weights"]["transformer.pos_emb"] += 0.1
    with pytest.raises(ValueError, match="other rotary angles than DALLE-pytorch 1.6"):
        loaded(tmp_path, turned)
    with pytest.raises(
        ValueError,
        match="the codec has 11 codes on a grid of 8 x 8; the transformer expects 11 on 4 x 4",
    ):
        loaded(tmp_path, {**saved, "vae_params": {**RECORDED["vae_params"], "image_size": 64}})
    torch.save({"model": saved["weights"]}, tmp_path / "other.pt")
    (tmp_path / "dalle.pt").unlink()
    assert not recognise(tmp_path / "other.pt") and not recognise(tmp_path)
