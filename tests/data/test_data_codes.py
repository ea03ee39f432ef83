from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.data.codes import encode
from unclip.data.folder import FolderDataset
from unclip.data.loader import DataConfig, Loader, open_dataset
from unclip.data.precomputed import CodeDataset

pytest.importorskip("pyarrow")


class MeanCodec(torch.nn.Module):
    """A codec whose code for a 4 x 4 patch is its brightness, 0 to 299."""

    vocab_size, image_size, grid = 300, 8, (2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.nn.Parameter(torch.tensor(299.0))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.avg_pool2d(images, 4).mean(1)  # (B, 2, 2)
        return ((means + 1) / 2 * self.level).round().long().detach()


@pytest.fixture
def images(tmp_path: Path) -> FolderDataset:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (50 * i,) * 3).save(folder / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "text": [f"grey {i}", f"shade {i}"]} for i in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return FolderDataset(folder)


def test_encoded_codes_are_loaded(images, tmp_path):
    assert encode(images, MeanCodec(), tmp_path / "codes", batch_size=2, part_size=3) == {}
    dataset = open_dataset(tmp_path / "codes")
    assert isinstance(dataset, CodeDataset) and (dataset.vocab_size, dataset.grid) == (300, (2, 2))
    batch = dataset.batch([4, 0])
    assert batch["codes"].dtype == torch.long and batch["caption"] == ["grey 4", "grey 0"]
    assert batch["codes"][:, 0, 0].tolist() == [round(200 / 255 * 299), 0]
    assert np.load(tmp_path / "codes/codes/codes_0.npy").dtype == np.uint16  # codes exceed 255
    config = DataConfig(str(tmp_path / "codes"), image_size=8, batch_size=2)
    loaded = next(iter(Loader(config)))
    assert set(loaded) == {"codes", "caption", "key"} and loaded["codes"].shape == (2, 2, 2)


def test_all_captions_get_one_row_each(images, tmp_path):
    encode(images, MeanCodec(), tmp_path / "codes", all_captions=True)
    dataset = CodeDataset(tmp_path / "codes")
    assert (
        dataset.captions[:3] == ["grey 0", "shade 0", "grey 1"]
        and dataset.weights.tolist() == [0.5] * 10
    )
    codes = dataset.batch([2, 3])["codes"]
    assert torch.equal(codes[0], codes[1])


def test_a_folder_of_another_codec_is_not_resumed(images, tmp_path):
    encode(images, MeanCodec(), tmp_path / "codes", source={"codec": "a"})
    with pytest.raises(ValueError, match="started with codec 'a', now 'b'"):
        encode(images, MeanCodec(), tmp_path / "codes", source={"codec": "b"})


def test_errors_name_the_file_and_the_value(images, tmp_path):
    encode(images, MeanCodec(), tmp_path / "codes")
    np.save(tmp_path / "codes/codes/codes_0.npy", np.zeros((5, 2, 2)))
    with pytest.raises(
        ValueError, match=r"codes_0\.npy: float64 .*; expected unsigned integers \(N, h, w\)"
    ):
        CodeDataset(tmp_path / "codes")
    np.save(tmp_path / "codes/codes/codes_0.npy", np.zeros((5, 2, 2), np.uint8))
    for text, message in (
        ("{}", "vocab_size is None; expected an integer"),
        ('{"vocab_size": "9"}', "vocab_size is '9'; expected an integer"),
        ("{", "not valid JSON"),
    ):
        (tmp_path / "codes/codes.json").write_text(text)
        with pytest.raises(ValueError, match=rf"codes\.json:? .*{message}"):
            CodeDataset(tmp_path / "codes")
    np.save(tmp_path / "codes/codes/codes_0.npy", np.full((5, 2, 2), 9, np.uint8))
    (tmp_path / "codes/codes.json").write_text('{"vocab_size": 9}')
    with pytest.raises(
        ValueError, match=r"codes contains the code 9; vocab_size in codes\.json is 9"
    ):
        CodeDataset(tmp_path / "codes").batch([0])
    (tmp_path / "codes/codes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"codes\.json is missing"):
        CodeDataset(tmp_path / "codes")
    (tmp_path / "codes/codes/codes_0.npy").unlink()
    with pytest.raises(FileNotFoundError, match="no image codes"):
        CodeDataset(tmp_path / "codes")
