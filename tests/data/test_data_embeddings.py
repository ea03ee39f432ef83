import io
import json
import os
import sys
from dataclasses import replace
from itertools import chain, repeat

import numpy as np
import pytest
import torch
from conftest import tiny_clip
from PIL import Image

from unclip.data.embeddings import embed, main
from unclip.data.loader import DataConfig, Loader, open_dataset
from unclip.data.parts import PartWriter
from unclip.data.precomputed import EmbeddingDataset
from unclip.data.shards import ShardDataset, ShardWriter

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return tiny_clip().eval()


@pytest.fixture
def shards(tmp_path):
    """Write seven images with two captions each."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    with ShardWriter(tmp_path / "data", "train") as writer:
        for i in range(7):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
            meta = {"captions": [f"apple {i}", f"fish {i}"], "weight": 1.0 if i else 0.5}
            writer.write(f"k{i}", {"png": file.getvalue(), "json": meta})
    return tmp_path / "data"


def write(folder, sizes=(3, 2), text=True):
    writer = PartWriter(folder)
    rows = 0
    for number, size in enumerate(sizes):
        emb = torch.arange(rows, rows + size)[:, None] + torch.zeros(size, 4)
        arrays = {"img_emb": emb.numpy(), "text_emb": -emb.numpy()}
        writer.write_part(number, arrays, {"caption": [f"c{rows + i}" for i in range(size)]})
        rows += size
    return folder


def test_written_embeddings_are_read(tmp_path):
    dataset = EmbeddingDataset(write(tmp_path))
    assert len(dataset) == 5 and dataset.weights.tolist() == [1] * 5
    batch = dataset.batch([4, 0, 2, 3])
    assert (
        batch["image_emb"][:, 0].tolist() == [4, 0, 2, 3]
        and batch["image_emb"].dtype == torch.float32
    )
    assert torch.equal(batch["text_emb"], -batch["image_emb"])
    assert batch["caption"] == ["c4", "c0", "c2", "c3"] and batch["key"] == [
        "1-1",
        "0-0",
        "0-2",
        "1-0",
    ]
    assert isinstance(dataset._arrays["img_emb"][0], np.memmap)


def test_variants_of_clip_retrieval_are_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for folder in ("img_emb", "metadata"):  # no text_emb; more than ten parts; float16
        (tmp_path / folder).mkdir()
    for number in range(11):
        np.save(tmp_path / f"img_emb/img_emb_{number}.npy", np.full((2, 4), number, np.float16))
        table = pyarrow.table({"image_path": ["x", "y"], "caption": [f"{number} a", f"{number} b"]})
        pyarrow.parquet.write_table(table, tmp_path / f"metadata/metadata_{number}.parquet")
    dataset = EmbeddingDataset(tmp_path)
    batch = dataset.batch(range(22))
    assert "text_emb" not in batch
    assert batch["image_emb"][:, 0].tolist() == [n for n in range(11) for _ in range(2)]
    assert batch["caption"][-1] == "10 b"


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"weight": [1.0, -1.0, 2.0]}, "weight is -1.0; expected a number from 0 to 10,000"),
        ({"weight": [1.0, float("nan"), 2.0]}, "weight is nan; expected a number"),
        ({"weight": [1.0, None, 2.0]}, "weight is None; expected a number"),
        ({"caption": ["a", None, "c"]}, "no caption"),
        ({"caption": ["a", " ", "c"]}, "no caption"),
        ({"caption": [b"a", b"caf\xe9", b"c"]}, "character 3 of the caption is '\\udce9'"),
        ({"caption": [["a"], [], ["c"]]}, None),
    ],
)
def test_broken_rows_are_left_out_and_named(tmp_path, column, message):
    import pyarrow

    emb, writer = torch.arange(6.0)[:, None].repeat(1, 4).numpy(), PartWriter(tmp_path)
    columns = {"caption": ["a", "b", "c"], **column}
    if isinstance(columns["caption"][0], bytes):
        data = pyarrow.array(columns["caption"], pyarrow.binary())
        columns["caption"] = pyarrow.Array.from_buffers(
            pyarrow.string(), 3, data.buffers()
        )  # like a writer that does not check
        writer.write_part(0, {"img_emb": emb[:3], "text_emb": emb[:3]}, {"caption": ["", "", ""]})
        pyarrow.parquet.write_table(
            pyarrow.table(columns), tmp_path / "metadata/metadata_0.parquet"
        )
    else:
        writer.write_part(0, {"img_emb": emb[:3], "text_emb": emb[:3]}, columns)
    writer.write_part(1, {"img_emb": emb[3:], "text_emb": emb[3:]}, {"caption": ["d", "e", "f"]})
    dataset = EmbeddingDataset(tmp_path)
    row = f"{tmp_path}/metadata/metadata_0.parquet: row 1"
    if message is None:  # lists of captions: there is no embedding for each caption
        assert len(dataset) == 3 and len(dataset.broken) == 3
        return
    assert list(dataset.broken) == [row] and dataset.broken[row].startswith(message)
    batch = dataset.batch(range(5))
    assert batch["image_emb"][:, 0].tolist() == [0, 2, 3, 4, 5]
    assert batch["caption"] == ["a", "c", "d", "e", "f"] and batch["key"][1] == "0-2"
    assert dataset.weights.tolist()[2:] == [1, 1, 1]
    config = DataConfig(str(tmp_path), image_size=8, batch_size=2)
    with pytest.raises(ValueError, match="1 of 6 samples are broken and left out, more than"):
        Loader(config)
    with pytest.warns(UserWarning, match=r"1 of 6 samples are broken.*metadata_0\.parquet: row 1"):
        assert len(Loader(replace(config, max_broken=0.5)).broken) == 1


def test_the_loader_returns_embeddings_and_resumes(tmp_path):
    config = DataConfig(str(write(tmp_path, (30, 20))), image_size=64, batch_size=8, workers=2)
    whole = [
        batch
        for _, batch in zip(range(9), chain.from_iterable(repeat(Loader(config))), strict=False)
    ]
    assert set(whole[0]) == {"image_emb", "text_emb", "caption", "key"} and whole[0][
        "image_emb"
    ].shape == (8, 4)
    for batch in whole:
        assert batch["caption"] == [f"c{int(value)}" for value in batch["image_emb"][:, 0]]
    resumed = Loader(config)
    resumed.load_state_dict({"epoch": 1, "batch": 1})
    assert next(iter(resumed))["caption"] == whole[7]["caption"]
    assert len(list(resumed.captions())) == 50


def test_embeddings_equal_clip_outputs(shards, clip, tmp_path):
    dataset = ShardDataset(shards)
    assert embed(dataset, clip, tmp_path / "emb", batch_size=3, part_size=4) == {}
    assert sorted(path.name for path in (tmp_path / "emb/img_emb").iterdir()) == [
        "img_emb_0.npy",
        "img_emb_1.npy",
    ]
    batch = EmbeddingDataset(tmp_path / "emb").batch(range(7))
    assert batch["caption"] == [f"apple {i}" for i in range(7)] and batch["key"] == [
        f"k{i}" for i in range(7)
    ]
    with torch.inference_mode():
        expected = clip.encode_image([sample.image for sample in dataset])
        torch.testing.assert_close(batch["image_emb"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            batch["text_emb"], clip.encode_text(batch["caption"]).emb, rtol=1e-4, atol=1e-5
        )


def test_captions_of_an_image_share_its_weight(shards, clip, tmp_path):
    embed(ShardDataset(shards), clip, tmp_path / "emb", all_captions=True, batch_size=3)
    dataset = open_dataset(tmp_path / "emb")
    assert dataset.captions[:4] == ["apple 0", "fish 0", "apple 1", "fish 1"] and len(dataset) == 14
    assert dataset.weights[:4].tolist() == [0.25, 0.25, 0.5, 0.5]
    batch = dataset.batch([2, 3])
    assert torch.equal(batch["image_emb"][0], batch["image_emb"][1])
    assert not torch.equal(batch["text_emb"][0], batch["text_emb"][1])


def test_an_interrupted_run_resumes_by_parts(shards, clip, tmp_path, monkeypatch):
    dataset, out = ShardDataset(shards), tmp_path / "emb"
    read = []
    original = ShardDataset.__getitem__

    def interrupted(self, index):
        read.append(index)
        if index == 5 and len(read) < 8:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(ShardDataset, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed(dataset, clip, out, part_size=2)
    first = (out / "img_emb/img_emb_0.npy").stat().st_mtime_ns
    read.extend([-1] * 8)
    embed(dataset, clip, out, part_size=2)
    assert (
        read[-3:] == [4, 5, 6]
        and -1 in read
        and (out / "img_emb/img_emb_0.npy").stat().st_mtime_ns == first
    )
    assert len(EmbeddingDataset(out)) == 7
    with pytest.raises(ValueError, match="started with captions 'canonical', now 'all'"):
        embed(dataset, clip, out, part_size=2, all_captions=True)


def test_the_command_embeds_and_reports_errors(shards, clip, tmp_path, capsys):
    clip.save_pretrained(tmp_path / "clip")
    command = [
        str(shards),
        str(tmp_path / "emb"),
        "--clip",
        str(tmp_path / "clip"),
        "--device",
        "cpu",
    ]
    main(command)
    assert "7 rows, 0 broken" in capsys.readouterr().out
    assert json.loads((tmp_path / "emb/embeddings.json").read_text())["data"] == str(shards)
    with pytest.raises(SystemExit, match="already contains embeddings"):
        main([str(tmp_path / "emb"), *command[1:]])
    with pytest.raises(SystemExit, match="error: .*is missing"):
        main([*command[:3], str(tmp_path / "nowhere")])
    for option, value, message in (
        ("--part-size", "-5", "part_size is -5; expected at least 1"),
        ("--batch-size", "0", "batch_size is 0; expected at least 1"),
        ("--device", "nonsense", "the device 'nonsense' is not available"),
    ):
        with pytest.raises(SystemExit, match=f"error: {message}"):
            main([command[0], str(tmp_path / "other"), *command[2:], option, value])
    assert not list(tmp_path.glob("other/*"))
    for size in ("0", "100000"):
        with pytest.raises(SystemExit):
            main([*command, "--layout", size])
        assert f"--layout is {size}; expected 1 to 256 pixels" in capsys.readouterr().err


def test_a_job_is_not_resumed_with_other_options(shards, clip, tmp_path):
    clip.save_pretrained(tmp_path / "clip")
    command = [str(shards), str(tmp_path / "emb"), "--clip", str(tmp_path / "clip")]
    first = ["--layout", "8", "--recolour", "2"]
    main([*command, *first])
    main([*command, *first])
    for options, message in (
        (["--recolour", "2"], "started with layout 8, now None"),
        (["--layout", "8"], "started with recolour 2, now None"),
        ([*first, "--caption", "title"], "started with caption None, now 'title'"),
    ):
        with pytest.raises(SystemExit, match=f"{message}; use another folder"):
            main([*command, *options])
    record = tmp_path / "emb/parts/part_0.json"
    record.write_text("{}")
    with pytest.raises(SystemExit, match="part_0.json is damaged; delete it and run again"):
        main([*command, *first])
    (tmp_path / "emb/embeddings.json").write_text("[]")
    with pytest.raises(SystemExit, match="embeddings.json holds a list; expected a JSON object"):
        main([*command, *first])


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("98304 requested and 8192 written")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*img_emb_0.npy: 98304.*is the disk full\?"):
        write(tmp_path)


def test_too_many_broken_images_are_an_error(shards, clip, tmp_path):
    with ShardWriter(shards, "zz") as writer:
        writer.write("bad", {"png": b"bad", "txt": "bad"})
    with pytest.raises(ValueError, match="1 broken samples, over 1%"):
        embed(ShardDataset(shards), clip, tmp_path / "emb")


def test_pickles_are_never_loaded(tmp_path):
    np.save(
        write(tmp_path) / "img_emb/img_emb_0.npy", np.array([{"a": 1}], object), allow_pickle=True
    )
    with pytest.raises(ValueError, match=r"img_emb_0\.npy is not a readable npy array"):
        EmbeddingDataset(tmp_path)


def test_names_that_are_not_utf_8_work_from_start_to_end(clip, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for name in ("a", os.fsdecode(b"\xff")):
        Image.new("RGB", (16, 16)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("x")
    clip.save_pretrained(tmp_path / "clip")
    main([str(folder), str(folder / "emb"), "--clip", str(tmp_path / "clip"), "--device", "cpu"])
    assert "2 rows, 0 broken" in capsys.readouterr().out
    assert EmbeddingDataset(folder / "emb").keys == ["a", r"\udcff"]
    batch = next(iter(Loader(DataConfig(str(folder / "emb"), image_size=8, batch_size=2))))
    assert sorted(batch["key"]) == [r"\udcff", "a"]


def test_damaged_and_foreign_files_give_one_line(tmp_path):
    folder = write(tmp_path)
    array, table = folder / "img_emb/img_emb_0.npy", folder / "metadata/metadata_0.parquet"
    whole, rows = array.read_bytes(), table.read_bytes()
    for data in (b"", whole[:40], b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, b"\x80\x02Nr\xff."):
        array.write_bytes(data)
        with pytest.raises(
            ValueError, match=r"img_emb_0\.npy is not a readable npy array"
        ) as error:
            EmbeddingDataset(folder)
        assert "\n" not in str(error.value)
    with open(array, "wb") as file:
        np.savez(file, x=np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"img_emb_0\.npy is .* archive"):
        EmbeddingDataset(folder)
    np.save(array, np.zeros((3, 4), "datetime64[s]"))
    with pytest.raises(ValueError, match=r"datetime64.*expected floating-point"):
        EmbeddingDataset(folder)
    array.write_bytes(whole)
    for data in (b"", rows[:100], b"PAR1" * 50, b"version https://git-lfs.github.com/spec/v1\n"):
        table.write_bytes(data)
        with pytest.raises(ValueError, match=r"metadata_0\.parquet is not a readable") as error:
            EmbeddingDataset(folder)
        assert "\n" not in str(error.value)


def test_errors_name_the_file_and_the_value(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no embeddings"):
        EmbeddingDataset(tmp_path)
    np.save(write(tmp_path) / "text_emb/text_emb_1.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"part 1 has unequal numbers of rows: .*'text_emb': 3"):
        EmbeddingDataset(tmp_path)
    np.save(tmp_path / "text_emb/text_emb_1.npy", np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="the parts of text_emb differ in shape"):
        EmbeddingDataset(tmp_path)
    (tmp_path / "metadata/metadata_1.parquet").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"metadata_1\.parquet is not a readable parquet"):
        EmbeddingDataset(tmp_path)
    (tmp_path / "metadata/metadata_1.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata_1\.parquet is missing"):
        EmbeddingDataset(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"needs pyarrow.parquet: pip install 'unclip\[data\]'"):
        EmbeddingDataset(tmp_path)


@pytest.mark.filterwarnings("ignore:1 of 12 captions are longer")
def test_copies_in_other_colours_are_embedded_with_their_captions(tmp_path, clip):
    (tmp_path / "data").mkdir()
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 20, 20)).save(file, "PNG")
    meta = {"captions": ["a red apple", "apple, noto emoji"], "annotation": "red apple"}
    with ShardWriter(tmp_path / "data", "train") as writer:
        for name, extra in (("apple", {"colour": "red"}), ("flag", {"group": "flags"})):
            writer.write(name, {"png": file.getvalue(), "json": {**meta, **extra, "weight": 1.0}})
    dataset = ShardDataset(tmp_path / "data")
    embed(dataset, clip, tmp_path / "out", all_captions=True, layout=4, recolour=4)
    rows = EmbeddingDataset(tmp_path / "out")
    assert rows.weights.sum() == pytest.approx(2)
    batch = rows.batch(range(len(rows)))
    captions = batch["caption"]
    assert captions[:2] == ["a red apple", "apple, noto emoji"] == captions[-2:]
    copies = captions[2:-2]
    assert len(set(copies)) == 8 and all(not text.startswith("a red") for text in copies)
    assert rows.weights[2:-2].sum() == pytest.approx(0.5)
    layouts = batch["layout"].flatten(1)
    assert (layouts[2:-2] - layouts[0]).abs().amax(dim=1).min() > 0.2
    embed(dataset, clip, tmp_path / "again", all_captions=True, layout=4, recolour=4)
    again = EmbeddingDataset(tmp_path / "again").batch(range(len(rows)))
    assert torch.equal(again["layout"], batch["layout"]) and again["caption"] == captions
