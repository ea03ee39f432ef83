"""train/draw.py: the images of a dataset are drawn again by a model that starts from layouts."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from scripts import ROOT, load_script, run_script

from unclip.data.loader import open_dataset
from unclip.data.shards import ShardWriter
from unclip.pipelines.unclip.pipeline import UnCLIPPipeline

SCRIPT = ROOT / "train/draw.py"


@pytest.fixture
def data(tmp_path):
    """Layouts of a yellow and of a blue disc."""
    (tmp_path / "layouts").mkdir()
    y, x = np.mgrid[:16, :16] - 7.5
    disc = (x**2 + y**2 < 40)[..., None]
    with ShardWriter(tmp_path / "layouts", "train") as writer:
        for name, colour in {"yellow": (250, 200, 40), "blue": (40, 80, 230)}.items():
            file = io.BytesIO()
            Image.fromarray(np.where(disc, colour, 255).astype(np.uint8)).save(file, "PNG")
            meta = {"captions": [f"{name} circle, noto emoji", "circle"], "style": "noto"}
            writer.write(name, {"png": file.getvalue(), "json": meta})
    return f"{tmp_path}/layouts"


def pixels(folder) -> list[np.ndarray]:
    dataset = open_dataset(folder)
    return [np.asarray(dataset[i].image, dtype=float) for i in range(len(dataset))]


def test_images_follow_captions_and_layouts(data, tmp_path, monkeypatch):
    arguments = ["--model", "emoji", "--data", data, "--out"]
    run_script(SCRIPT, *arguments, str(tmp_path / "whole"))
    dataset = open_dataset(tmp_path / "whole")
    assert [dataset[i].key for i in range(2)] == ["yellow", "blue"]
    assert dataset[0].captions == ["yellow circle, noto emoji", "circle"]
    assert dataset[0].meta["style"] == "noto" and dataset[0].image.size == (64, 64)
    yellow, blue = pixels(tmp_path / "whole")
    middle = (slice(28, 36), slice(28, 36))
    assert yellow[middle][..., 0].mean() > 150 > yellow[middle][..., 2].mean()
    assert blue[middle][..., 2].mean() > 150 > blue[middle][..., 0].mean()

    script = load_script("draw")  # one image in each batch and shard
    monkeypatch.setattr(script, "SHARD", 1)
    sample_prior, calls = UnCLIPPipeline.sample_prior, []

    def interrupt(self, *values, **options):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample_prior(self, *values, **options)

    monkeypatch.setattr(UnCLIPPipeline, "sample_prior", interrupt)
    again = str(tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        script.main("emoji", data, again, 0)
    script.main("emoji", data, again, 0)
    assert len(calls) == 3  # the first image is not drawn again
    for one, other in zip(pixels(again), (yellow, blue), strict=True):
        assert np.abs(one - other).mean() < 1  # alone and in a batch
    with pytest.raises(SystemExit, match="started with seed 0, now 1; use another folder"):
        run_script(SCRIPT, *arguments, again, "--seed", "1")


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        ("emoji-dalle1", "{data}", "emoji-dalle1 does not start from layouts"),
        ("emoji", "{data}/none-*.tar", "none-"),
    ],
)
def test_errors(model, source, message, data, tmp_path):
    arguments = ["--model", model, "--data", source.format(data=data)]
    with pytest.raises(SystemExit, match=message):
        run_script(SCRIPT, *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
