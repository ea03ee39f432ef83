import copy
import io
import pickle
import tarfile

import pytest
from PIL import Image

from unclip.data.shards import ShardDataset, ShardWriter, find_shards


def png(color="red"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, "PNG")
    return file.getvalue()


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_written_samples_are_read(tmp_path):
    with ShardWriter(tmp_path, "train", samples_per_shard=2) as writer:
        for i in range(5):
            writer.write(
                f"s{i}",
                {
                    "png": png((i, 0, 0)),
                    "txt": f"number {i}",
                    "json": {"weight": i / 4, "über": "ß"},
                },
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"train-0000{i}.tar" for i in range(3)
    ]
    dataset = ShardDataset(tmp_path)
    assert len(dataset) == 5 and dataset.weights.tolist() == [0, 0.25, 0.5, 0.75, 1]
    for i in (4, 0, 3):
        sample = dataset[i]
        assert (sample.key, sample.captions, sample.weight) == (f"s{i}", [f"number {i}"], i / 4)
        assert sample.image.getpixel((0, 0)) == (i, 0, 0) and sample.meta["über"] == "ß"


def test_a_copy_for_a_worker_reads_the_same(tmp_path):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("a", {"png": png(), "txt": "a"})
    again = copy.deepcopy(ShardDataset(tmp_path))  # deepcopy uses the hooks of pickling to a worker
    assert again[0].image.getpixel((0, 0)) == (255, 0, 0)


def test_samples_are_grouped_up_to_the_first_dot(tmp_path):
    write_members(
        tmp_path / "a.tar",
        {
            "d.1/fox.png": png(),
            "d.1/fox.seg.png": png(),
            "d.1/fox.JSON": b'{"caption": "x"}',
            "d.1/owl.jpg": png(),
        },
    )
    dataset = ShardDataset(tmp_path / "a.tar")
    assert [dataset._index[i][1] for i in range(2)] == ["d.1/fox", "d.1/owl"]
    assert dataset[0].captions == ["x"]


def test_json_captions_take_precedence_over_txt(tmp_path):
    members = {
        "a.txt": b"from txt",
        "a.png": png(),
        "a.json": b'{"captions": ["one", "two"]}',
        "b.png": png(),
    }
    write_members(
        tmp_path / "a.tar", members | {"b.txt": "\ufeff from txt\n".encode(), "b.json": b"{}"}
    )
    dataset = ShardDataset(tmp_path / "a.tar")
    assert dataset[0].captions == ["one", "two"] and dataset[1].captions == ["from txt"]


def test_pickles_and_links_are_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    bomb = pickle.dumps(Bomb())
    write_members(
        tmp_path / "a.tar",
        {"a.png": png(), "a.txt": b"a", "a.pyd": bomb, "a.pth": bomb, "a.pkl": bomb},
    )
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    dataset = ShardDataset(tmp_path / "a.tar")
    assert len(dataset) == 1 and dataset[0].captions == ["a"]
    assert set(dataset._index[0][2]) == {"png", "txt"}


def test_a_sample_with_damaged_json_is_reported(tmp_path):
    write_members(
        tmp_path / "a.tar",
        {"a.png": png(), "a.json": b'{"weight": 2,', "b.png": png(), "b.txt": b"\xff"},
    )
    dataset = ShardDataset(tmp_path / "a.tar")
    for i, name in enumerate("ab"):
        with pytest.raises(ValueError, match=rf"a\.tar: {name}: "):
            dataset[i]


def test_sources_can_be_patterns_ranges_lists_and_folders(tmp_path):
    for name in ("train-000", "train-001", "train-002", "heldout-000"):
        write_members(tmp_path / f"{name}.tar", {"a.png": png(), "a.txt": b"a"})
    assert len(find_shards(str(tmp_path / "train-*.tar"))) == 3
    assert [path.name for path in find_shards(f"{tmp_path}/train-{{001..002}}.tar")] == [
        "train-001.tar",
        "train-002.tar",
    ]
    assert len(ShardDataset([tmp_path / "train-000.tar", tmp_path / "heldout-000.tar"])) == 2
    with pytest.raises(FileNotFoundError, match=r"2 missing shards, e\.g\. .*/train-003\.tar"):
        find_shards(f"{tmp_path}/train-{{001..004}}.tar")
    with pytest.raises(ValueError, match="heldout"):  # held-out data is not used by accident
        find_shards(tmp_path)
    (tmp_path / "heldout-000.tar").unlink()
    assert len(find_shards(tmp_path)) == 3


def test_hidden_files_of_macos_are_ignored(tmp_path):
    write_members(
        tmp_path / "a.tar", {"._a.png": b"?", "a.png": png(), "._a.txt": b"?", "a.txt": b"caption"}
    )
    dataset = ShardDataset(tmp_path)
    assert len(dataset) == 1 and dataset[0].captions == ["caption"]


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no shards at .*missing-\*\.tar"):
        ShardDataset(str(tmp_path / "missing-*.tar"))
    write_members(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"a"})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"cut\.tar is not a readable"):
        ShardDataset(tmp_path / "cut.tar")
    write_members(
        tmp_path / "long.tar", {f"{i}.{kind}": png() for i in range(9) for kind in ("png", "txt")}
    )
    whole = bytearray((tmp_path / "long.tar").read_bytes())
    (tmp_path / "cut.tar").write_bytes(whole[:4096])  # at the end of a member
    with pytest.raises(
        ValueError, match=r"cut\.tar is not a readable.*damaged or truncated at byte 4,096"
    ):
        ShardDataset(tmp_path / "cut.tar")
    whole[4096] ^= 1  # in the header of the next member
    (tmp_path / "cut.tar").write_bytes(whole)
    with pytest.raises(
        ValueError, match=r"cut\.tar is not a readable.*damaged or truncated at byte 4,096"
    ):
        ShardDataset(tmp_path / "cut.tar")
    write_members(tmp_path / "bare.tar", {"a.png": png()})
    with pytest.raises(ValueError, match="no captions"):
        ShardDataset(tmp_path / "bare.tar")
    write_members(tmp_path / "text.tar", {"a.txt": b"a"})
    with pytest.raises(ValueError, match="no image"):
        ShardDataset(tmp_path / "text.tar")
    with ShardWriter(tmp_path, "x") as writer, pytest.raises(ValueError, match="without dots"):
        writer.write("a.b", {"txt": "a"})
