import copy
import io
import os
import pickle
import tarfile

import pytest
from PIL import Image

from unclip.data.loader import open_dataset
from unclip.data.samples import EXTENSIONS, SUFFIXES
from unclip.data.shards import ShardDataset, ShardWriter, find_shards
from unclip.data.tars import Member, read_members
from unclip.data.text import ColumnNames


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
    assert [sample.key for sample in dataset] == ["d.1/fox"] and dataset[0].captions == ["x"]
    assert dataset.broken == {f"{tmp_path}/a.tar: d.1/owl": "no caption"}
    assert dataset.left_out == {".seg.png images besides the first of a sample": 1}


def test_captions_may_be_missing_if_none_are_needed(tmp_path):
    write_members(tmp_path / "a.tar", {"a.png": png(), "b.png": png(), "b.txt": b"red"})
    assert len(ShardDataset(tmp_path)) == 1
    dataset = ShardDataset(tmp_path, captions_needed=False)
    assert [sample.captions for sample in dataset] == [[""], ["red"]] and not dataset.broken


def test_images_outside_the_shards_of_a_folder_are_counted(tmp_path):
    write_members(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"red"})
    for name in ("b.png", "sub/c.JPG", ".hidden.png", "__MACOSX/d.png", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for source in (tmp_path, [tmp_path / "a.tar", tmp_path]):
        reason = "images outside the tar shards, which take precedence"
        assert ShardDataset(source).left_out == {reason: 2}
    assert not ShardDataset(tmp_path / "a.tar").left_out


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
    assert set(dataset._index[0][2]) == {"image", "txt"}
    assert dataset.left_out.pop("links, sparse files and devices") == 1
    assert set(dataset.left_out) == {f".{name} members" for name in ("pyd", "pth", "pkl")}


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
    with pytest.raises(FileNotFoundError, match=r"2 missing, e\.g\. .*/train-003\.tar"):
        find_shards(f"{tmp_path}/train-{{001..004}}.tar")
    with pytest.raises(ValueError, match="heldout"):  # held-out data is not used by accident
        find_shards(tmp_path)
    (tmp_path / "heldout-000.tar").unlink()
    assert len(find_shards(tmp_path)) == 3


def test_patterns_with_braces_and_folders_with_odd_names(tmp_path):
    for folder in ("my {old} data", "what?", "set [1]"):
        (tmp_path / folder).mkdir()
        write_members(tmp_path / folder / "a.tar", {"a.png": png(), "a.txt": b"a"})
        write_members(tmp_path / folder / "b.tar", {"b.png": png(), "b.txt": b"b"})
        for source in (folder, f"{folder}/*.tar", f"{folder}/{{b,a}}.tar", f"{folder}/a.tar"):
            found = "".join(path.stem for path in find_shards(f"{tmp_path}/{source}"))
            assert found == {"a": "a", "}": "ba"}.get(source[:-4][-1:], "ab")
    both = f"{tmp_path}/{{what?,set [1]}}/{{a,b}}.tar"
    assert len(find_shards(both)) == 4
    dataset = open_dataset([f"{tmp_path}/what?/a.tar", f"{tmp_path}/set [1]/*.tar"])
    assert [sample.key for sample in dataset] == ["a", "a", "b"]
    with pytest.raises(FileNotFoundError, match=r"1 missing, e\.g\. .*c\.tar"):
        find_shards(f"{tmp_path}/what?/{{a,c}}.tar")


def test_hidden_and_foreign_members_are_skipped(tmp_path):
    write_members(tmp_path / "._b.tar", {})
    members = {"._a.png": b"?", "__MACOSX/a.png": b"?", "./a.png": png(), ".DS_Store": b"?"}
    write_members(tmp_path / "a.tar", {**members, "._a.txt": b"?", "./a.txt": b"caption\nother"})
    dataset = ShardDataset(tmp_path)
    assert len(dataset) == 1 and dataset[0].captions == ["caption", "other"]
    assert not dataset.broken and not dataset.left_out


def test_folders_and_shards_have_the_same_formats(tmp_path):
    (tmp_path / "folder").mkdir()
    members = {}
    for format, extensions in SUFFIXES.items():
        for extension in extensions:
            if extension not in EXTENSIONS:  # this Pillow has no AVIF
                continue
            file = io.BytesIO()
            Image.new("RGB", (4, 4), "red").save(file, format)
            members |= {f"{extension}.v2.{extension}": file.getvalue()}
            members |= {f"{extension}.v2.txt": extension.encode()}
    for name, data in members.items():
        (tmp_path / "folder" / name).write_bytes(data)
    write_members(tmp_path / "a.tar", members)
    datasets = [open_dataset(tmp_path / name) for name in ("folder", "a.tar")]
    for dataset in datasets:
        assert {sample.captions[0] for sample in dataset} == set(EXTENSIONS)
        assert {sample.image.size for sample in dataset} == {(4, 4)}
        assert not dataset.broken and not dataset.left_out


def test_names_and_captions_that_are_not_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    members = {f"{name}.png": png(), f"{name}.txt": b"x", "b.png": png(), "b.txt": b"caf\xe9"}
    write_members(tmp_path / "a.tar", members)
    dataset = ShardDataset(tmp_path / "a.tar")
    assert dataset[0].key == r"caf\udce9" and dataset[0].image.size == (4, 4)
    with pytest.raises(ValueError, match=r"a\.tar: b: byte 0xe9 at position 3 .*save .* as UTF-8"):
        dataset[1]


def test_a_json_key_for_captions_can_be_chosen(tmp_path):
    members = {"a.png": png(), "a.json": b'{"title": "x", "caption": "y"}', "a.txt": b"z"}
    write_members(tmp_path / "a.tar", members)
    assert ShardDataset(tmp_path, ColumnNames(caption="title"))[0].captions == ["x"]
    with pytest.raises(ValueError, match=r"a\.tar: a: no caption"):
        ShardDataset(tmp_path, ColumnNames(caption="text"))[0]


@pytest.mark.parametrize("kind", ["sparse", "huge", "negative", "huge pax header"])
def test_absurd_members_are_refused_in_little_memory(tmp_path, kind):
    info = tarfile.TarInfo("s.json")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if kind == "sparse":
        header[156:157] = tarfile.GNUTYPE_SPARSE
        header[386:410] = b"%011o\0%011o\0" % (0, 0)
        header[483:495] = b"%011o\0" % (6 << 30)
    elif kind == "negative":
        header[124:136] = b"\xff" * 12
    else:
        header[124:136] = b"%011o\0" % (6 << 30)
        if kind == "huge pax header":
            header[156:157] = tarfile.XHDTYPE
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(ValueError, match=r"a\.tar"):
        ShardDataset(tmp_path / "a.tar")


def test_the_end_of_an_image_is_not_a_header_by_accident(tmp_path):
    end = b"\xfb\xc0\x85\xc0"  # its signed sum and that of a checksum's 8 spaces is 0
    write_members(tmp_path / "a.tar", {"a.png": b"\x80" * 1024 + end, "a.txt": b"a red fox"})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[:512] = b"\xff" * 512
    (tmp_path / "a.tar").write_bytes(data)
    found = read_members(tmp_path / "a.tar")
    assert [x.name for x in found if isinstance(x, Member)] == ["a.txt"]


@pytest.mark.parametrize("size", [1024, tarfile.RECORDSIZE])
def test_a_tar_without_members_is_a_shard_of_no_samples(tmp_path, size):
    (tmp_path / "empty.tar").write_bytes(bytes(size))
    with pytest.raises(ValueError, match="no usable sample in 1 shards"):
        ShardDataset(tmp_path)
    write_members(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"a"})
    dataset = ShardDataset(tmp_path)
    assert [dataset[i].key for i in range(len(dataset))] == ["a"] and not dataset.broken


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no shards at .*missing-\*\.tar"):
        ShardDataset(str(tmp_path / "missing-*.tar"))
    write_members(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"a"})
    whole = (tmp_path / "a.tar").read_bytes()
    for name in ("cut", "short"):
        (tmp_path / f"{name}.tar").write_bytes(whole[:700])
    with pytest.raises(
        ValueError, match=r"2 of 3 shards .*cut\.tar is cut off.*a\.png.*short\.tar"
    ):
        ShardDataset(tmp_path)
    (tmp_path / "cut.tar").write_bytes(whole[:2048])  # at the end of a member
    with pytest.raises(ValueError, match=r"cut\.tar is cut off at byte 2,048: the end mark"):
        ShardDataset(tmp_path / "cut.tar")
    for data, message in (
        (b"\x1f\x8b" + whole, "compressed with gzip"),
        (b"x" * 20_000, "is not a tar: it has no valid header"),
        (bytes(20_000), "is not a tar: it has no valid header"),
        (b"x", "is not a tar: it has 1 bytes"),
    ):
        (tmp_path / "other.tar").write_bytes(data)
        with pytest.raises(ValueError, match=rf"other\.tar is {message}|other\.tar {message}"):
            ShardDataset(tmp_path / "other.tar")
    os.mkfifo(tmp_path / "fifo.tar")
    with pytest.raises(ValueError, match=r"fifo\.tar is not a regular file"):
        ShardDataset(tmp_path / "fifo.tar")
    write_members(tmp_path / "bare.tar", {"a.png": png()})
    with pytest.raises(ValueError, match=r"no usable sample.*bare\.tar: a: no caption"):
        ShardDataset(tmp_path / "bare.tar")
    write_members(tmp_path / "text.tar", {"a.txt": b"a"})
    with pytest.raises(ValueError, match=r"1 samples without an image, only \.txt"):
        ShardDataset(tmp_path / "text.tar")
    with ShardWriter(tmp_path, "x") as writer, pytest.raises(ValueError, match="without dots"):
        writer.write("a.b", {"txt": "a"})
