"""CLIP in transformers' layout: tokens, embeddings and pixels match, import and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import karlo
import numpy as np
import pytest
import torch
from karlo import transformers
from parity import randomize
from PIL import Image

from unclip.checkpoints.transformers import clip as transformers_clip
from unclip.checkpoints.transformers.clip import read_clip, read_config
from unclip.checkpoints.transformers.tokenizer import read_tokenizer, write_tokenizer
from unclip.clip import CLIP, CLIPConfig, OpenCLIPTokenizer
from unclip.tokenizer import BPETokenizer

TEXTS = [
    "a red apple",
    "  Wow!!  It's\tA RED\napple, isn't it?  ",
    "",
    "!",
    "1234 5.6 µm — naïve “quotes” <|endoftext|> </w>",
    "日本語 🍎 ﬁ e\u0301",
    "a word and another " * 10,
]
ALL = 49408 - 514  # CLIP's own number of merges


def theirs(merges: int, **special: str) -> Any:
    vocab, pairs = karlo.clip_vocabulary(merges)
    pairs = [tuple(pair.split()) for pair in pairs]
    return transformers.CLIPTokenizer(
        vocab=vocab, merges=pairs, model_max_length=40, **{**karlo.SPECIAL, **special}
    )


def assert_same_tokens(ours: Any, reference: Any) -> None:
    expected = reference(
        TEXTS, padding="max_length", max_length=40, truncation=True, return_tensors="pt"
    )
    ids, mask = ours(TEXTS)
    assert torch.equal(mask, expected.attention_mask.bool())
    assert torch.equal(ids[mask], expected.input_ids[mask])  # names of padding tokens do not matter


@pytest.mark.filterwarnings("ignore:the prompt")
@pytest.mark.parametrize(
    ("merges", "pad"), [(0, "!"), (200, "!"), (200, "<|endoftext|>"), (ALL, "!")]
)
def test_the_tokenizer_matches_transformers(tmp_path: Path, merges: int, pad: str) -> None:
    reference = theirs(merges, pad_token=pad)
    karlo.write_tokenizer(reference, tmp_path / "old")
    settings = json.loads((tmp_path / "old" / "tokenizer_config.json").read_text())
    (tmp_path / "old" / "tokenizer_config.json").write_text(
        json.dumps({**settings, "pad_token": {"content": pad}})
    )
    reference.save_pretrained(tmp_path / "new")
    for form in ("old", "new"):
        tokenizer = read_tokenizer(tmp_path / form, 40)
        assert_same_tokens(tokenizer, reference)
        written = tmp_path / f"{form} written"
        assert write_tokenizer(tokenizer, written) == "CLIPTokenizer"
        assert_same_tokens(tokenizer, transformers.CLIPTokenizer.from_pretrained(written))
        tokenizer.save(tmp_path / "tokenizer.json")
        assert torch.equal(
            BPETokenizer.load(tmp_path / "tokenizer.json", 40)(TEXTS)[0], tokenizer(TEXTS)[0]
        )
    ids, mask = tokenizer(["A red apple"])
    assert tokenizer.decode(ids[mask].tolist()) == "a red apple"


def test_open_clips_tokenizer_is_exported(tmp_path: Path) -> None:
    ours = OpenCLIPTokenizer(CLIPConfig({"text_cfg": {"context_length": 40}}))
    assert write_tokenizer(ours, tmp_path / "tokenizer") == "CLIPTokenizer"
    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = TEXTS[:4]  # open_clip normalises text first: quotation marks, ligatures
    expected = reference(texts, padding="max_length", truncation=True, return_tensors="pt")
    ids, mask = ours(texts)
    assert torch.equal(mask, expected.attention_mask.bool()) and torch.equal(
        ids[mask], expected.input_ids[mask]
    )


@pytest.mark.filterwarnings("ignore:the prompt")
def test_our_own_tokenizers_are_exported(tmp_path: Path) -> None:
    ours = BPETokenizer.train(TEXTS, vocab_size=400, context_length=40)
    assert write_tokenizer(ours, tmp_path / "tokenizer") == "PreTrainedTokenizerFast"
    assert_same_tokens(
        ours, transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    )
    again = read_tokenizer(tmp_path / "tokenizer", 40)
    assert torch.equal(again(TEXTS)[0], ours(TEXTS)[0])
    write_tokenizer(again, tmp_path / "again")
    assert_same_tokens(
        ours, transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    )


def write_towers(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """Write a text and an image encoder with random weights; settings: other than CLIP's."""
    pipe = karlo.image_variation()
    text_config = transformers.CLIPTextConfig(**{**pipe.text_encoder.config.to_dict(), **settings})
    vision_config = transformers.CLIPVisionConfig(
        **{
            **pipe.image_encoder.config.to_dict(),
            **{k: v for k, v in settings.items() if k != "eos_token_id"},
        }
    )
    torch.manual_seed(0)
    pipe.text_encoder = randomize(transformers.CLIPTextModelWithProjection(text_config).eval())
    pipe.image_encoder = randomize(transformers.CLIPVisionModelWithProjection(vision_config).eval())
    karlo.write(pipe, folder)
    return pipe.text_encoder, pipe.image_encoder


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hidden_act": "gelu"},
        {"layer_norm_eps": 1e-3},
        {"eos_token_id": 2},
        {"intermediate_size": 40},
    ],
    ids=str,
)
def test_towers_match_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    text_encoder, image_encoder = write_towers(tmp_path, **settings)
    clip = read_clip(tmp_path, with_images=True)
    text, pixels = clip.encode_text(["a fish", "", "wow!"]), torch.randn(2, 3, 32, 32)
    expected = text_encoder(text.ids)
    torch.testing.assert_close(text.emb, expected.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text.states, expected.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        clip.model.encode_image(pixels), image_encoder(pixels).image_embeds, rtol=0, atol=1e-5
    )
    files = {
        "text.json": transformers_clip.write_config(clip, clip.tokenizer),
        "vision.json": transformers_clip.write_vision_config(clip),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert (
        read_config(tmp_path / "text.json", tmp_path / "vision.json").model_cfg
        == clip.config.model_cfg
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"resample": 2},
        {"image_mean": [0.1, 0.2, 0.3]},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(32, 32), (50, 41), (35, 70), (20, 33)])
def test_preprocessing_matches_transformers(
    tmp_path: Path, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    """Up to about one level: images are resized in 8 bits."""
    side = {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessor(
        **{"size": {"shortest_edge": 32}, "crop_size": side, **settings}
    )
    processor.save_pretrained(tmp_path)
    preprocess = transformers_clip.read_processor(tmp_path / "preprocessor_config.json", 32)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1}
    text = {"width": 16, "heads": 2, "layers": 1, "vocab_size": 600}
    clip = CLIP(CLIPConfig({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, preprocess))
    blobs = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC)
    expected = processor(images=image, return_tensors="pt").pixel_values
    assert (clip.prepare([image]) - expected).abs().max() < 2.1 / 255 / 0.26
    (tmp_path / "again.json").write_text(json.dumps(transformers_clip.write_processor(clip)))
    assert transformers_clip.read_processor(tmp_path / "again.json", 32) == {
        **preprocess,
        "mean": list(clip.preprocess.mean),
        "std": list(clip.preprocess.std),
    }


def test_a_text_tower_alone_is_saved_in_our_format(tmp_path: Path) -> None:
    write_towers(tmp_path / "theirs")
    clip = read_clip(tmp_path / "theirs", with_images=False)
    clip.save_pretrained(tmp_path / "clip")
    again = CLIP.from_pretrained(tmp_path / "clip")
    assert again.model.visual is None
    with torch.no_grad():
        assert torch.equal(again.encode_text(TEXTS[:1]).emb, clip.encode_text(TEXTS[:1]).emb)
    with pytest.raises(ValueError, match="has no image encoder"):
        again.encode_image(torch.zeros(1, 3, 32, 32))
