"""The hash of a dataset's samples does not depend on where they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet
from scripts import write_shape_images

from unclip.data.fingerprint import samples_hash
from unclip.data.loader import open_dataset

METADATA = "metadata/metadata_0.parquet"


def test_moved_samples_have_the_same_hash_and_others_do_not(tmp_path: Path) -> None:
    write_shape_images(tmp_path / "first")
    before = samples_hash(open_dataset(tmp_path / "first"))
    shutil.move(tmp_path / "first", tmp_path / "second")
    assert samples_hash(open_dataset(tmp_path / "second")) == before
    (tmp_path / "second/3.png").rename(tmp_path / "second/13.png")
    (tmp_path / "second/3.txt").rename(tmp_path / "second/13.txt")
    assert samples_hash(open_dataset(tmp_path / "second")) != before


def test_samples_with_the_same_keys_differ_by_caption_or_image(tmp_path: Path) -> None:
    """Folders often number their images, and rows of tables have only numbers."""
    data = tmp_path / "data"
    write_shape_images(data)
    first = samples_hash(open_dataset(data))
    (data / "3.txt").write_text("a cat")
    second = samples_hash(open_dataset(data))
    assert second[:64] == first[:64] and second != first  # checkpoints of old versions have 64
    for file in data.glob("*.txt"):
        file.unlink()
    third = samples_hash(open_dataset(data, captions_needed=False))
    (data / "3.png").write_bytes((data / "4.png").read_bytes())
    assert third not in (second, samples_hash(open_dataset(data, captions_needed=False)))
    for caption in ("a cat", "a dog"):
        folder = tmp_path / caption
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True)
        np.save(folder / "img_emb/img_emb_0.npy", np.ones((1, 4), np.float32))
        parquet.write_table(pyarrow.table({"caption": [caption]}), folder / METADATA)
    cat, dog = (samples_hash(open_dataset(tmp_path / name)) for name in ("a cat", "a dog"))
    assert cat != dog
