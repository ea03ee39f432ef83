import json
import os
import re
from dataclasses import replace

import pytest
from PIL import Image

from unclip.data.folder import FolderDataset
from unclip.data.text import ColumnNames


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(tmp_path / name)
    return tmp_path


def as_pairs(dataset):
    return [(sample.key, sample.captions) for sample in dataset]


def test_captions_in_text_files(folder):
    for name in ("a", "b", "sub/c"):
        (folder / f"{name}.txt").write_text(
            f" image {name}\n", encoding="utf-8-sig" if name == "b" else "utf-8"
        )
    dataset = FolderDataset(folder)
    expected = [("a", ["image a"]), ("b", ["image b"]), ("sub/c", ["image sub/c"])]
    assert as_pairs(dataset) == expected and dataset.weights.tolist() == [1, 1, 1]
    assert dataset[0].image.size == (4, 4)


def test_images_with_one_name_and_two_suffixes_have_keys_of_their_own(folder):
    Image.new("RGB", (4, 4), "blue").save(folder / "b.jpg")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(name)
    dataset = FolderDataset(folder)
    assert as_pairs(dataset) == [("a", ["a"]), ("b.jpg", ["b"]), ("b.png", ["b"])]


def test_captions_in_jsonl(folder):
    rows = [
        {"file_name": "b.png", "text": "a b"},
        {"file_name": "sub/c.webp", "caption": ["a c", "c"], "weight": 0.5, "style": "x"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    dataset = FolderDataset(folder)
    assert as_pairs(dataset) == [("b", ["a b"]), ("sub/c", ["a c", "c"])]
    assert dataset.weights.tolist() == [1, 0.5] and dataset[1].meta["style"] == "x"


@pytest.mark.parametrize("column", ["text", "caption"])
def test_captions_in_csv(folder, column):
    table = folder / "any.csv"
    rows = f'\ufefffile_name,{column}\r\nb.png,"red, and ""square"""\r\n'  # as Excel writes it
    table.write_bytes(rows.encode())
    for source in (folder, table):
        dataset = FolderDataset(source)
        assert as_pairs(dataset) == [("b", ['red, and "square"'])]
        assert dataset[0].image.size == (4, 4)


def test_missing_captions_name_the_three_layouts(folder):
    with pytest.raises(ValueError, match=r"no captions; expected.*name\.txt.*metadata\.jsonl.*CSV"):
        FolderDataset(folder)
    (folder / "b.txt").write_text("b")
    dataset = FolderDataset(folder)
    assert as_pairs(dataset) == [("b", ["b"])]
    missing = [str(folder / name) for name in ("a.JPG", "sub/c.webp")]
    assert dataset.broken == dict.fromkeys(missing, "no caption")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"file_name": "b.png"}', r"the columns are \['file_name'\]; .*data\.columns"),
        (b"[1]", r"expected an object, got \[1\]"),
        (b'{"file_name": 5, "text": "b"}', "file_name is 5; expected the name of a file"),
        (b'{"file_name": "b.png", "text": "b", "weight": -1}', "weight is -1"),
        (b'{"file_name": "b.png", "text": "b", "weight": ' + b"9" * 4000 + b"}", "weight is 9999"),
        (b'{"file_name": "b.png", "text": null}', "no caption"),
        (b'{"file_name": "b.png", "text": " "}', "no caption"),
        (b'{"file_name": "b.png", "text": ["a", 5]}', "the caption is 5; expected a string"),
        (rb'{"file_name": "b.png", "text": "x\ud83d"}', r"character 1 .*\\ud83d.*UTF-8"),
        (b'{"file_name": "b.png", "text": "caf\xe9"}', "byte 0xe9 at .*save the file as UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_rows_are_named_with_their_line(folder, line, message):
    good = b'{"file_name": "b.png", "text": "b"}\n'
    (folder / "metadata.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    dataset = FolderDataset(folder)
    assert len(dataset) == 2 and list(dataset.broken) == [f"{folder}/metadata.jsonl: line 3"]
    (reason,) = dataset.broken.values()
    assert re.search(message, reason) and len(reason) < 200 and reason.isprintable()


def test_a_row_that_names_a_pipe_is_broken(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "pipe.png", "text": "b"}\n')
    (sample,) = FolderDataset(folder)
    with pytest.raises(ValueError, match=r"pipe.png: a folder, a pipe or a device; expected a f"):
        sample.image  # noqa: B018


@pytest.mark.parametrize("name", ["any.csv", "any.tsv"])
def test_a_quote_that_is_never_closed_is_an_error(folder, name):
    tab = "\t" if name == "any.tsv" else ","
    rows = [["file_name", "text"], ["b.png", '"two\nlines"'], ["a.JPG", '"5 inch'], ["b.png", "x"]]
    (folder / name).write_text("\n".join(map(tab.join, rows[:2])) + "\n")
    assert as_pairs(FolderDataset(folder / name)) == [("b", ["two\nlines"])]
    (folder / name).write_text("\n".join(map(tab.join, rows)) + "\n")
    with pytest.raises(ValueError, match=f"{name}: line 4: a quote is opened and never closed"):
        FolderDataset(folder / name)


def test_images_that_a_table_does_not_list_are_counted(folder):
    rows = f"./b.png,red\n{folder}/sub/c.webp,\n"  # the second one is broken, but listed
    (folder / "selection.csv").write_text(f"file_name,text\n{rows}")
    dataset = FolderDataset(folder)
    assert [sample.captions for sample in dataset] == [["red"]] and len(dataset.broken) == 1
    assert dataset.left_out == {"images that selection.csv does not list": 1}
    assert not FolderDataset(folder / "selection.csv").left_out  # the table was chosen


@pytest.mark.parametrize(
    "content", ["id,price\n1,2\n", "", "file_name;price\nb.png;2\n", "id\n".encode("utf-16")]
)
def test_a_table_of_another_purpose_is_left_out_if_images_have_captions(folder, content):
    notes = folder / "notes.csv"
    notes.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"notes\.csv"):
        FolderDataset(folder)
    for name in ("a", "b", "sub/c"):
        (folder / f"{name}.txt").write_text(name)
    dataset = FolderDataset(folder)
    assert len(dataset) == 3 and not dataset.broken
    reason = "tables without the columns file_name and text or caption or captions"
    assert dataset.left_out == {reason: 1}
    (folder / "good.csv").write_text("file_name,text\nb.png,red\n")
    dataset = FolderDataset(folder)
    assert as_pairs(dataset) == [("b", ["red"])]
    assert dataset.left_out == {reason: 1, "images that good.csv does not list": 2}


def test_captions_may_be_missing_if_none_are_needed(folder):
    dataset = FolderDataset(folder, captions_needed=False)
    assert as_pairs(dataset) == [("a", [""]), ("b", [""]), ("sub/c", [""])]
    (folder / "b.txt").write_text("red")
    (folder / "sub/c.txt").write_text(" ")
    (folder / "notes.csv").write_text("id,price\n1,2\n")
    dataset = FolderDataset(folder, captions_needed=False)
    assert as_pairs(dataset) == [("a", [""]), ("b", ["red"]), ("sub/c", [""])]
    assert not dataset.broken and dataset.weights.tolist() == [1, 1, 1]
    rows = '{"file_name": "a.JPG"}\n{"file_name": "b.png", "text": "red"}\n'
    (folder / "metadata.jsonl").write_text(rows)
    dataset = FolderDataset(folder, captions_needed=False)
    assert as_pairs(dataset) == [("a", [""]), ("b", ["red"])] and not dataset.broken


def test_a_folder_without_images_is_an_error_if_no_captions_are_needed(tmp_path):
    (tmp_path / "a.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match=r"0 images \(1 \.svg files\); expected images \(png, "):
        FolderDataset(tmp_path, captions_needed=False)


def test_errors_name_the_file(folder):
    with pytest.raises(ValueError, match=r"a\.JPG is not a table \(\.jsonl, \.csv, \.tsv\)"):
        FolderDataset(folder / "a.JPG")
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        FolderDataset(folder / "nowhere")
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "b"}\n')
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        FolderDataset(folder)[0].image  # noqa: B018
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        FolderDataset(folder)
    (folder / "metadata.jsonl").unlink()
    contents = {"a": b" \n", "b": b"caf\xe9", "sub/c": "x".encode("utf-16")}
    for name, content in contents.items():
        (folder / f"{name}.txt").write_bytes(content)
    for index, message in enumerate(("no caption", "0xe9 .*save the file as UTF-8", "is UTF-16")):
        with pytest.raises(ValueError, match=rf"(a\.JPG|b\.png|c\.webp): .*{message}"):
            FolderDataset(folder)[index]
    for name in ("x.csv", "y.csv"):
        (folder / name).write_text("file_name,text\n")
    with pytest.raises(ValueError, match=r"2 CSV or TSV files.*x\.csv"):
        FolderDataset(folder)


def test_hidden_and_foreign_files_are_skipped(folder):
    junk = ("._a.JPG", ".DS_Store", "Thumbs.db", "__MACOSX/x.png", ".ipynb_checkpoints/x.png")
    for name in ("a.txt", "b.txt", "sub/c.txt", *junk):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    dataset = FolderDataset(folder)
    assert [sample.key for sample in dataset] == ["a", "b", "sub/c"]
    assert not dataset.broken and not dataset.left_out


def test_other_files_are_counted_with_their_kind(folder):
    for name in ("a.txt", "b.txt", "sub/c.txt", "d.svg", "e.svg", "README", "lonely.txt"):
        (folder / name).write_bytes(b"x")
    os.mkfifo(folder / "fifo.png")
    (folder / "broken.png").symlink_to("nowhere.png")
    assert FolderDataset(folder).left_out == {
        ".svg files": 2,
        "files without suffix": 1,
        "captions without image": 1,
        "broken links and devices": 2,
    }


def test_each_line_of_a_text_file_is_a_caption(folder):
    (folder / "a.txt").write_text("a circle\r\n\n  a disc \n")
    (folder / "b.json").write_text('{"caption": ["one", null, "two"], "weight": 2}')
    (folder / "sub/c.txt").write_text("c")
    dataset = FolderDataset(folder)
    assert [sample.captions for sample in dataset] == [
        ["a circle", "a disc"],
        ["one", "two"],
        ["c"],
    ]
    assert dataset.weights.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.tsv", "path\ttitle\tweight\nb.png\ta, b\t7\n"),
        ("t.csv", "path;title;weight\nb.png;a, b;7\n"),
        ("t.csv", '\ufeff path , title,weight\r\nb.png,"a, b",7\r\n'),
        ("t.jsonl", '{"path": "b.png", "title": "a, b", "w": 7}\n'),
    ],
)
def test_columns_can_be_chosen(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"line \d: the columns are .*title.*data\.columns"):
        FolderDataset(folder / name)
    columns = ColumnNames(image="path", caption="title")
    dataset = FolderDataset(folder / name, columns)
    # A column named weight may have another meaning: it is used on demand.
    assert as_pairs(dataset) == [("b", ["a, b"])] and dataset.weights.tolist() == [1]
    weighted = replace(columns, weight="w" if name == "t.jsonl" else "weight")
    assert FolderDataset(folder / name, weighted).weights.tolist() == [7]


def test_paths_may_be_written_on_windows(folder):
    (folder / "t.csv").write_bytes(b'file_name,text\r\nsub\\c.webp,"two\nlines"\r\n')
    (sample,) = FolderDataset(folder)
    assert sample.key == "sub/c" and sample.captions == ["two\nlines"]
    assert sample.image.size == (4, 4)


def test_names_that_are_not_utf_8(folder):
    name = os.fsdecode(b"caf\xe9")
    (folder / "b.png").rename(folder / f"{name}.png")
    for text in ("a", name, "sub/c"):
        (folder / f"{text}.txt").write_text("x")
    sample = FolderDataset(folder)[1]
    assert sample.key == r"caf\udce9" and sample.image.size == (4, 4)
    (folder / "t.csv").write_bytes(b"file_name,text\ncaf\xe9.png,good\nb.png,caf\xe9\n")
    dataset = FolderDataset(folder)
    assert dataset[0].image.size == (4, 4) and list(dataset.broken) == [f"{folder}/t.csv: line 3"]


def test_links_to_folders_are_followed_without_cycles(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    Image.new("RGB", (4, 4)).save(other / "d.png")
    for path in (folder / "a.txt", folder / "b.txt", folder / "sub/c.txt", other / "d.txt"):
        path.write_text("x")
    (folder / "linked").symlink_to(other)
    (folder / "sub/up").symlink_to(folder)
    (other / "back").symlink_to(folder)
    keys = [sample.key for sample in FolderDataset(folder)]
    assert keys == ["a", "b", "linked/d", "sub/c"]


def test_a_git_lfs_pointer_is_recognised(folder):
    for name in ("a", "b", "sub/c"):
        (folder / f"{name}.txt").write_text("x")
    (folder / "b.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="Git LFS pointer.*git lfs pull"):
        FolderDataset(folder)[1].image  # noqa: B018
