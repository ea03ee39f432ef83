import json

import pytest
from PIL import Image

from unclip.data.folder import FolderDataset


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
    with pytest.raises(ValueError, match=r"2 of 3 images have no caption, e\.g\. .*a\.JPG"):
        FolderDataset(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "entry 2"),
        ('{"file_name": "b.png"}', "entry 2: file_name or text"),
        ("[1]", "entry 2: expected an object"),
        ('{"file_name": 5, "text": "b"}', "entry 2: file_name is 5; expected a string"),
        ('{"file_name": "b.png", "text": "b", "weight": -1}', "entry 2: weight is -1"),
    ],
)
def test_errors_in_rows_name_the_entry(folder, line, message):
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "b"}\n' + line)
    with pytest.raises(ValueError, match=rf"metadata\.jsonl: {message}"):
        FolderDataset(folder)


def test_errors_name_the_file(folder):
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        FolderDataset(folder / "nowhere")
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "b"}\n')
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        FolderDataset(folder)[0].image  # noqa: B018
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        FolderDataset(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "a.txt").write_text(" ")
    for name in ("b", "sub/c"):
        (folder / f"{name}.txt").write_text("b")
    with pytest.raises(ValueError, match=r"a\.JPG: no caption"):
        FolderDataset(folder)[0]
    for name in ("x.csv", "y.csv"):
        (folder / name).write_text("file_name,text\n")
    with pytest.raises(ValueError, match=r"2 CSV files.*x\.csv"):
        FolderDataset(folder)
