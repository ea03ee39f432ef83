"""Datasets of the `datasets` library, from local files."""

from __future__ import annotations

import importlib.util

import pytest
from scripts import write_shape_images

from unclip.data.loader import DataConfig, Loader, open_dataset
from unclip.data.text import ColumnNames


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is not None, reason="datasets is installed"
)
def test_the_package_is_named():
    with pytest.raises(ValueError, match=r"needs datasets: pip install 'unclip\[remote\]'"):
        open_dataset("datasets:org/name")


def test_a_dataset_must_be_named():
    for source in ("datasets:", "datasets::train"):
        with pytest.raises(
            ValueError, match=f"'{source}' names no dataset; expected datasets:NAME"
        ):
            open_dataset(source)


def test_rows_are_batches_of_captioned_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    captions = write_shape_images(tmp_path / "shapes", size=16)
    paths = [str(tmp_path / f"shapes/{i}.png") for i in range(len(captions))]
    rows = datasets.Dataset.from_dict({"image": paths, "text": captions})
    rows = rows.cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "saved")
    source = f"datasets:{tmp_path / 'saved'}"
    dataset = open_dataset(source)
    assert [dataset[i].captions for i in range(12)] == [[caption] for caption in captions]
    loader = Loader(DataConfig(source, image_size=16, batch_size=4))
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 3, 16, 16)
    number = int(batch["key"][0].removeprefix("train-"))
    assert batch["caption"][0] == captions[number]

    rows.rename_column("text", "label").save_to_disk(tmp_path / "other")
    with pytest.raises(
        ValueError, match="has the columns image .*, label .*; expected one Image, one of"
    ):
        open_dataset(f"datasets:{tmp_path / 'other'}")
    images = open_dataset(f"datasets:{tmp_path / 'other'}", captions_needed=False)
    assert images[0].captions == [""] and images[0].image.size == (16, 16)
    with pytest.raises(ValueError, match="datasets:.*nowhere"):
        open_dataset(f"datasets:{tmp_path / 'nowhere'}")


def saved_rows(folder, split, images):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {"image": images, "text": ["a"] * len(images)}
    rows = datasets.Dataset.from_dict(columns, features, split=split)
    return datasets, rows, f"datasets:{folder}"


def test_a_split_that_does_not_exist_is_an_error(tmp_path):
    datasets, rows, source = saved_rows(tmp_path / "rows", None, [None])
    rows.save_to_disk(tmp_path / "rows")
    assert len(open_dataset(f"{source}:train")) == len(open_dataset(source)) == 1
    with pytest.raises(ValueError, match="rows:test: there is no split test; expected train"):
        open_dataset(f"{source}:test")
    both = {"train": rows, "dev": saved_rows(tmp_path, "dev", [None])[1]}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "dict")
    assert open_dataset(f"datasets:{tmp_path}/dict:dev")[0].key == "dev-0"
    with pytest.raises(ValueError, match="there is no split test; expected train or dev"):
        open_dataset(f"datasets:{tmp_path}/dict:test")


def test_errors_name_the_columns_that_were_given_and_the_row_once(tmp_path):
    _, rows, source = saved_rows(tmp_path / "rows", "test", [None])
    rows.save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="text .*; expected an Image 'photo' and 'title'"):
        open_dataset(source, ColumnNames("photo", "title"))
    with pytest.raises(ValueError, match="^test-0: no image$"):
        _ = open_dataset(f"{source}:test")[0].image


def test_a_dataset_without_rows_is_named(tmp_path):
    datasets, empty, source = saved_rows(tmp_path / "rows", "test", [])
    empty.save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="rows has no rows$"):
        open_dataset(source)
    both = {"train": saved_rows(tmp_path, None, [None])[1], "test": empty}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "dict")
    assert len(open_dataset(f"datasets:{tmp_path}/dict")) == 1
    datasets.DatasetDict().save_to_disk(tmp_path / "none")
    for split in ("", ":test"):
        with pytest.raises(ValueError, match=f"none{split} has no splits; save a dataset"):
            open_dataset(f"datasets:{tmp_path}/none{split}")
    with pytest.raises(ValueError, match="dict:test has no rows$"):
        open_dataset(f"datasets:{tmp_path}/dict:test")


def test_datasets_of_equal_length_are_distinguished(tmp_path):
    """Their keys are train-0, train-1, ..., so that a run could be resumed with another one."""
    hashes = []
    for name, text in (("one", "a cat"), ("other", "a dog"), ("moved", "a dog")):
        _, rows, source = saved_rows(tmp_path / name, None, [None] * 3)
        rows.map(lambda _, text=text: {"text": text}).save_to_disk(tmp_path / name)
        hashes.append(Loader(DataConfig(source, image_size=16, batch_size=1)).samples_hash())
    assert hashes[0] != hashes[1] == hashes[2]
