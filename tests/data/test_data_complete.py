"""Completion of a dataset: concepts that a style lacks are predicted from other styles."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from unclip.data import complete, style_translation
from unclip.data.complete import main
from unclip.data.loader import open_dataset
from unclip.data.shards import ShardWriter
from unclip.data.style_translation import TranslatorTraining, predict, read_table

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220), "green": (30, 160, 60)}
MISSING = [("blue", f"A{i}") for i in (2, 9)] + [("red", "A5")]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(style_translation, "WIDTHS", (16, 24, 32))
    monkeypatch.setattr(style_translation, "BATCH", 16)


def png(style: str, concept: int) -> bytes:
    """Draw a rectangle whose place is the concept's and whose colour is the style's."""
    image = Image.new("RGB", (64, 64), "white")
    x, y = 8 * (concept % 4), 12 * (concept // 4)
    ImageDraw.Draw(image).rectangle((x, y, x + 24, y + 20), fill=COLOURS[style])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("styles")
    with ShardWriter(folder, "train") as writer:
        for style in COLOURS:
            for concept in range(12):
                if (style, f"A{concept}") not in MISSING:
                    meta = {
                        "captions": [f"thing {concept}, {style} emoji", f"thing {concept}"],
                        "annotation": f"thing {concept}",
                        "style": style,
                        "hexcode": f"A{concept}",
                        "colour": style,
                        "tone": None,
                    }
                    files = {"png": png(style, concept), "json": meta}
                    writer.write(f"{style}-A{concept}", files)
    return folder


def error(table, network) -> float:
    cells = table.missing(table.styles)
    true = [png(table.styles[s], int(table.concepts[c][1:])) for s, c in cells.tolist()]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(one)).resize((16, 16))) for one in true])
    wanted = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return (predict(table, network, cells) - wanted).square().mean().item()


def test_missing_images_have_the_place_of_the_concept_and_the_colour_of_the_style(data):
    table = read_table(open_dataset(data), progress=False)
    assert table.present.sum() == 33 and len(table.missing(["blue"])) == 2
    training = TranslatorTraining(table, steps=250)
    before = error(table, training.average)  # the mean of the other styles
    after = error(table, training.run(progress=False))
    assert after < 0.3 * before, (before, after)


def test_the_command_resumes_exactly(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(style_translation, "SAVE_EVERY", 2)
    words = [str(data), "--steps", "6", "--styles", "blue"]
    main([words[0], str(tmp_path / "whole"), *words[1:]])
    assert f"{tmp_path}/whole: 2 predicted images" in capsys.readouterr().out
    update, stop = TranslatorTraining.update, 0

    def interrupt(self):
        if self.step == stop:
            raise KeyboardInterrupt
        update(self)

    command = [words[0], str(tmp_path / "again"), *words[1:]]
    for stop in (0, 5):  # noqa: B007  # read by `interrupt`; 0 is before the first update
        with monkeypatch.context() as patched, pytest.raises(SystemExit, match="command resumes"):
            patched.setattr(TranslatorTraining, "update", interrupt)
            main(command)
    with pytest.raises(SystemExit, match="started with seed 0, now 1; use another folder"):
        main([*command, "--seed", "1"])
    with pytest.raises(SystemExit, match=r"started with styles \['blue'\], now \['red'\]"):
        main([*command[:-1], "red"])
    main(command)
    files = [(tmp_path / name / "train-00000.tar").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1] and len([*(tmp_path / "again").iterdir()]) == 1

    sample = open_dataset(tmp_path / "again")[0]
    assert sample.captions == ["thing 2, blue emoji", "thing 2"]
    assert (sample.key, sample.meta["style"]) == ("blue-A2", "blue")
    assert sample.image.size == (64, 64)


def test_a_damaged_state_and_weights_of_zero_are_errors(data, tmp_path):
    table = read_table(open_dataset(data), progress=False)
    (tmp_path / "training.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="training.pt is damaged; delete it to start again"):
        TranslatorTraining(table, steps=2).run(tmp_path / "training.pt", progress=False)
    unweighted = {cell: replace(sample, weight=0.0) for cell, sample in table.samples.items()}
    with pytest.raises(ValueError, match="the weights of all images are 0"):
        TranslatorTraining(replace(table, samples=unweighted))


def test_captions_do_not_name_the_colour_of_the_source():
    captions = ["apple, noto emoji", "a red apple", "a picture of an apple"]
    meta = {"captions": captions, "colour": "red", "tone": None}
    image = Image.new("RGB", (8, 8), COLOURS["green"])
    changed = complete._with_colour(meta, image)
    assert changed["captions"] == [captions[0], captions[2]] and changed["colour"] == "green"
    named = {**meta, "captions": ["red apple, noto emoji", "a red apple"]}
    assert complete._with_colour(named, image)["captions"] == named["captions"]
    toned = {**meta, "tone": "dark"}
    assert complete._with_colour(toned, image) == toned


def test_skin_tones_are_variants_of_a_concept(data):
    table = read_table(open_dataset(data), progress=False)
    toned = style_translation.Table(
        table.styles,
        ["A0", "A0-1F3FB", *table.concepts[2:]],
        table.samples,
        table.images,
        table.present,
    )
    images, mask = toned.sources(torch.tensor([[0, 0], [0, 2]]), torch.Generator())
    assert mask[:, 0].tolist() == [0, 0] and mask[:, -1].tolist() == [1, 0]
    assert torch.equal(images[0, -1], table.images[0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{data} {data}", "exists; remove it"),
        ("{data} {out} --styles gold", "no style 'gold'; expected some of blue, green, red"),
        ("{data} {out} --styles green", "nothing is missing"),
        ("{data} {out} --steps 0", "--steps is 0; expected 1 or more"),
        ("{data} {out} --seed -1", "--seed is -1; expected 0 to 2147483647"),
        ("{tiny} {out}", 'expected "style" and "hexcode" in its metadata'),
    ],
)
def test_errors(arguments, message, data, tmp_path):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("a", {"png": png("red", 0), "txt": "a thing"})
    words = arguments.format(data=data, tiny=tmp_path, out=tmp_path / "out").split()
    with pytest.raises(SystemExit, match=message):
        main(words)
    assert not (tmp_path / "out").exists()
