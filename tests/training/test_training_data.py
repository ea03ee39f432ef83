"""Training on data as it comes: long captions, tiny data, embeddings of another kind."""

import re
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import CONTEXT, EMB_DIM, tiny_clip
from PIL import Image

from unclip.data.embeddings import embed
from unclip.data.folder import FolderDataset
from unclip.data.loader import DataConfig, Loader
from unclip.data.parts import PartWriter
from unclip.data.precomputed import EmbeddingDataset
from unclip.models.unclip.prior import EmbeddingStats
from unclip.tokenizer import BPETokenizer, TruncationWarning
from unclip.training.embedded import data_notes, measure_stats, open_loader
from unclip.training.initialization import report_long_captions


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    clip = tiny_clip().eval()
    with torch.no_grad():  # text and image embeddings of different lengths, as in real models
        clip.model.visual.proj.mul_(3)
    return clip


def write_images(folder, captions):
    folder.mkdir()
    for i, caption in enumerate(captions):
        Image.new("RGB", (8, 8), (i * 37 % 256, i * 91 % 256, 128)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


# -- long captions


def test_long_prompts_give_one_short_warning(clip):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clip.tokenizer(["word " * 20_000, "other " * 100, "short"])
    (warning,) = caught
    assert issubclass(warning.category, TruncationWarning)
    assert "2 prompts" in str(warning.message) and len(str(warning.message)) < 250


def test_long_captions_are_counted_and_reported_once(clip, tmp_path):
    captions = ["short"] * 5 + [f"long {i} " * 60 for i in range(3)]
    loader = Loader(DataConfig(str(write_images(tmp_path / "data", captions)), 8, 4))
    expected = (
        rf"3 of 8 captions are longer than {CONTEXT - 2} tokens and are cut; the longest ends '"
    )
    with pytest.warns(UserWarning, match=expected) as caught:
        report_long_captions(clip.tokenizer, loader)
    assert len(caught) == 1 and len(str(caught[0].message)) < 200
    with pytest.warns(UserWarning, match=expected) as caught:
        embed(FolderDataset(tmp_path / "data"), clip, tmp_path / "emb", batch_size=2)
    assert len(caught) == 1


def test_a_huge_word_is_learned_and_encoded_in_a_second():
    captions = ["x" * 100_000 + str(i) for i in range(2)] + ["a red apple"]
    started = time.process_time()
    tokenizer = BPETokenizer.train(captions, vocab_size=300, context_length=16)
    with pytest.warns(TruncationWarning):
        tokenizer(captions, dropout=0.1)
    assert time.process_time() - started < 1


# -- tiny data


@pytest.mark.parametrize("captions", [["one"], ["one", "two"]])
def test_statistics_need_two_different_images(clip, tmp_path, captions):
    folder = write_images(tmp_path / "data", captions)
    if len(captions) == 2:
        Image.open(folder / "0.png").save(folder / "1.png")
    loader = Loader(DataConfig(str(folder), 8, 2))
    with pytest.raises(ValueError, match="at least two different images"):
        measure_stats(EmbeddingStats(EMB_DIM), clip, loader, 10)


# -- embeddings of another CLIP or scale


def stored(clip, folder, change):
    """Embed 20 images and store them changed."""
    captions = [f"a {colour} {thing}" for colour in "abcd" for thing in "vwxyz"]
    images = [Image.effect_noise((16, 16), 10 * i + 5).convert("RGB") for i in range(20)]
    with torch.no_grad():
        pair = clip.encode_image(images), clip.encode_text(captions).emb
    image_emb, text_emb = (change(emb).float().numpy() for emb in pair)
    arrays = {"img_emb": image_emb, "text_emb": text_emb}
    PartWriter(folder).write_part(0, arrays, {"caption": captions})
    return DataConfig(str(folder), image_size=16, batch_size=4), pair[0]


def test_embeddings_of_this_clip_are_used_as_they_are(clip, tmp_path):
    config, image_emb = stored(clip, tmp_path, lambda emb: emb.half())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = open_loader(config, clip, embed_once=False)
    read = loader.dataset.batch(range(20))["image_emb"]
    torch.testing.assert_close(read, image_emb, rtol=1e-2, atol=1e-2)
    assert data_notes(loader) == {}


def test_embeddings_with_another_factor_are_rescaled(clip, tmp_path):
    config, image_emb = stored(clip, tmp_path, lambda emb: emb * 7)
    with pytest.warns(UserWarning, match="image_emb by 0.1429, text_emb by 0.1429"):
        loader = open_loader(config, clip, embed_once=False)
    read = loader.dataset.batch(range(20))["image_emb"]
    torch.testing.assert_close(read, image_emb, rtol=1e-3, atol=1e-4)


def test_normalised_embeddings_get_the_length_of_clip(clip, tmp_path):
    config, image_emb = stored(clip, tmp_path, lambda emb: emb / emb.norm(dim=1, keepdim=True))
    with pytest.warns(UserWarning, match=r"image_emb by .* this CLIP's own"):
        loader = open_loader(config, clip, embed_once=False)
    lengths = loader.dataset.batch(range(20))["image_emb"].norm(dim=1)
    assert 0.5 < lengths.mean() / image_emb.norm(dim=1).mean() < 2
    assert set(data_notes(loader)["embedding_scales"]) == {"image_emb", "text_emb"}
    with pytest.warns(UserWarning, match="image_emb by 5"):
        given = open_loader(DataConfig(config.path, 16, 4, emb_scale=5.0), clip, embed_once=False)
    assert given.dataset.batch([0])["image_emb"].norm().item() == pytest.approx(5, rel=1e-3)


def test_embeddings_of_another_clip_are_refused(clip, tmp_path):
    config, _ = stored(clip, tmp_path, lambda emb: emb.flip(1))
    with pytest.raises(ValueError, match=r"text embeddings of another CLIP: .*cosine .*0\.\d"):
        open_loader(config, clip, embed_once=False)
    lengths = torch.from_numpy(np.linspace(1, 3, 20, dtype=np.float32))[:, None]
    config, _ = stored(clip, tmp_path / "uneven", lambda emb: emb * lengths)
    with pytest.raises(ValueError, match="of another length"):
        open_loader(config, clip, embed_once=False)
    (tmp_path / "uneven/text_emb/text_emb_0.npy").unlink()
    (tmp_path / "uneven/text_emb").rmdir()
    assert "text_emb" not in EmbeddingDataset(tmp_path / "uneven").batch([0])
    assert re.search("uneven", str(open_loader(config, clip, False).config.path))
