"""The hash of a dataset's samples does not depend on where they are."""

from __future__ import annotations

import shutil
from pathlib import Path

from scripts import write_shape_images

from unclip.data.fingerprint import samples_hash
from unclip.data.loader import open_dataset


def test_moved_samples_have_the_same_hash_and_others_do_not(tmp_path: Path) -> None:
    write_shape_images(tmp_path / "first")
    before = samples_hash(open_dataset(tmp_path / "first"))
    shutil.move(tmp_path / "first", tmp_path / "second")
    assert samples_hash(open_dataset(tmp_path / "second")) == before
    (tmp_path / "second/3.png").rename(tmp_path / "second/13.png")
    (tmp_path / "second/3.txt").rename(tmp_path / "second/13.txt")
    assert samples_hash(open_dataset(tmp_path / "second")) != before
