"""Several weighted sources in one config, and shards of small images made from large ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import write_shape_images

from unclip.config import parse
from unclip.data.loader import DataConfig, Loader, open_dataset
from unclip.data.parts import sha256
from unclip.data.resize import main
from unclip.data.shards import ShardDataset, ShardWriter
from unclip.image_io import fit


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of three large images, and one broken image."""
    (tmp_path / "large").mkdir()
    with ShardWriter(tmp_path / "large", "train", 3) as writer:
        for i in range(5):
            colours = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(colours).save(tmp_path / "image.png")
            meta = {"captions": [f"a {i}", f"b {i}"], "weight": 0.5, "group": "x"}
            writer.write(f"k{i}", {"png": (tmp_path / "image.png").read_bytes(), "json": meta})
        writer.write("broken", {"png": b"broken", "txt": "broken"})
    return tmp_path / "large"


def test_sources_occur_by_their_weights(shards, tmp_path):
    write_shape_images(tmp_path / "shapes", size=16)
    sources = {str(tmp_path / "shapes"): 2, str(shards / "train-00000.tar"): 1}
    config = parse(DataConfig, {"path": sources, "image_size": 16, "batch_size": 5})
    loader, counts = Loader(config), Counter()
    for _ in range(2):
        for batch in loader:
            counts.update(batch["key"])
    assert len(open_dataset(sources)) == 15
    assert sum(n for key, n in counts.items() if key.startswith("0:")) == pytest.approx(48, abs=4)
    assert sum(n for key, n in counts.items() if key.startswith("1:")) == pytest.approx(3, abs=1)
    resumed = Loader(config)
    resumed.load_state_dict(loader.state_dict())
    assert next(iter(resumed))["key"] == next(iter(loader))["key"]


def test_errors_of_sources(tmp_path):
    with pytest.raises(ValueError, match="more than 0"):
        parse(DataConfig, {"path": {"a": 0}, "image_size": 16, "batch_size": 5})
    with pytest.raises(ValueError, match=r"path\.a is 1000000000.0; .*at most 10000"):
        parse(DataConfig, {"path": {"a": 1e9}, "image_size": 16, "batch_size": 5})
    with pytest.raises(FileNotFoundError, match="no data at .*nowhere"):
        open_dataset({str(tmp_path / "nowhere"): 1.0})


def test_small_shards_have_the_images_of_training_and_all_metadata(shards, tmp_path, capsys):
    main([str(shards), str(tmp_path / "small"), "--size", "8"])
    assert "6 images in this run, 1 broken images skipped" in capsys.readouterr().out
    large, small = ShardDataset(shards), ShardDataset(tmp_path / "small")
    assert len(small) == 5 and small.weights.tolist() == [0.5] * 5
    for i in range(5):
        assert (small[i].key, small[i].captions) == (large[i].key, large[i].captions)
        assert small[i].meta["group"] == "x"
        assert np.array_equal(np.asarray(small[i].image), np.asarray(fit(large[i].image, 8)))


def test_resizing_resumes_by_shards_and_is_the_same_in_tasks(shards, tmp_path):
    main([str(shards), str(tmp_path / "one"), "--size", "8", "--format", "jpeg"])
    (tmp_path / "two").mkdir()
    (tmp_path / "two/train-00001.part").write_bytes(b"of a killed process")
    for task in "10":
        command = [str(shards), str(tmp_path / "two"), "--size", "8", "--format", "jpeg"]
        main([*command, "--tasks", "2", "--task", task])
    for name in ("train-00000.tar", "train-00001.tar"):
        assert sha256(tmp_path / "one" / name) == sha256(tmp_path / "two" / name)
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {"train-00000.tar", "train-00001.tar", "resize.json"}


def test_a_resumed_resizing_has_the_same_settings(shards, tmp_path):
    command = [str(shards), str(tmp_path / "small"), "--format", "jpeg"]
    main([*command, "--size", "8"])
    (tmp_path / "small/train-00001.tar").unlink()
    for change, message in (
        (["--size", "16"], "size 8, now 16"),
        (["--size", "8", "--format", "png"], "format 'JPEG', now 'PNG'"),
        (["--size", "8", "--quality", "50"], "quality 95, now 50"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*command, *change])
    assert not (tmp_path / "small/train-00001.tar").exists()


def test_shards_without_captions_are_resized(tmp_path):
    (tmp_path / "large").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    with ShardWriter(tmp_path / "large", "train") as writer:
        writer.write("k", {"png": (tmp_path / "image.png").read_bytes()})
    main([str(tmp_path / "large"), str(tmp_path / "small"), "--size", "8"])
    assert open_dataset(tmp_path / "small", captions_needed=False)[0].captions == [""]


def test_errors_of_resizing(shards, tmp_path):
    with pytest.raises(SystemExit, match="error: size 0"):
        main([str(shards), str(tmp_path / "small"), "--size", "0"])
    with pytest.raises(SystemExit, match="error: no shards at"):
        main([str(tmp_path / "none-*.tar"), str(tmp_path / "small"), "--size", "8"])
