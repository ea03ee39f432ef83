"""Datasets of the `datasets` library, from local files."""

from __future__ import annotations

import importlib.util

import pytest
from scripts import write_shape_images

from unclip.data.loader import DataConfig, Loader, open_dataset


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is not None, reason="datasets is installed"
)
def test_the_package_is_named():
    with pytest.raises(ValueError, match="pip install datasets"):
        open_dataset("datasets:org/name")


def test_rows_are_batches_of_captioned_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    captions = write_shape_images(tmp_path / "shapes", size=16)
    paths = [str(tmp_path / f"shapes/{i}.png") for i in range(len(captions))]
    rows = datasets.Dataset.from_dict({"image": paths, "text": captions})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    source = f"datasets:{tmp_path / 'saved'}"
    dataset = open_dataset(source)
    assert [dataset[i].captions for i in range(12)] == [[caption] for caption in captions]
    loader = Loader(DataConfig(source, image_size=16, batch_size=4))
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 3, 16, 16)
    number = int(batch["key"][0].removeprefix("train-"))
    assert batch["caption"][0] == captions[number]

    rows.rename_column("text", "label").save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="has the columns image .*, label .*; expected one Image"):
        open_dataset(f"datasets:{tmp_path / 'other'}")
    images = open_dataset(f"datasets:{tmp_path / 'other'}", captions_needed=False)
    assert images[0].captions == [""] and images[0].image.size == (16, 16)
    with pytest.raises(ValueError, match="datasets:.*nowhere"):
        open_dataset(f"datasets:{tmp_path / 'nowhere'}")
