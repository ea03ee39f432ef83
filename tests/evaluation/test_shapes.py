"""Images of shapes, and the program that scores them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from unclip.cli.main import main
from unclip.data import shapes
from unclip.data.compose import is_held_out
from unclip.data.shapes import AXES, COLOURS, SHAPES, Scene, Shape, draw, make_scene
from unclip.data.shards import ShardDataset
from unclip.evaluation.shapes import find_shapes, is_correct


def test_true_images_are_scored_as_correct():
    rng = np.random.default_rng(0)
    scenes = [make_scene(axis, rng) for axis in AXES for _ in range(15)]
    correct = [is_correct(draw(scene.shapes, 64), scene) for scene in scenes]
    assert np.mean(correct) >= 0.995


@pytest.mark.slow
def test_at_most_one_true_image_of_200_is_scored_wrong():
    rng = np.random.default_rng(1)
    scenes = [make_scene(axis, rng) for axis in AXES for _ in range(500)]
    assert np.mean([is_correct(draw(scene.shapes, 64), scene) for scene in scenes]) >= 0.995


@pytest.mark.parametrize("axis", AXES)
def test_other_images_are_not(axis):
    """Another scene of the axis, a missing object, an added one and an empty image are wrong."""
    rng, wrong = np.random.default_rng(2), 0
    blank = np.full((64, 64, 3), 255, np.uint8)
    for _ in range(10):
        scene, other = make_scene(axis, rng), make_scene(axis, rng)
        image = draw(scene.shapes, 64)
        assert not is_correct(blank, scene)
        assert not is_correct(draw(scene.shapes[1:], 64), scene)
        speck = Shape("square", "red", 0.12, 0.08, 0.08)
        far = all(max(abs(s.x - 0.08), abs(s.y - 0.08)) > 0.12 + s.size / 2 for s in scene.shapes)
        assert not (far and is_correct(draw([*scene.shapes, speck], 64), scene))
        if other.caption != scene.caption:
            wrong += not is_correct(image, other)
    assert wrong >= 8  # some captions hold for other scenes too, "a star" for a small star


def test_relations_and_attributes_can_be_swapped():
    red, blue = Shape("circle", "red", 0.3, 0.25, 0.5), Shape("star", "blue", 0.3, 0.75, 0.5)
    pair = (red, blue)
    left = Scene("position", "", pair, False, "to the left of")
    assert is_correct(draw(pair, 64), left)
    assert not is_correct(draw(pair, 64), replace(left, relation="to the right of"))
    both = Scene("attribution", "", pair, True)
    swapped = (replace(red, colour="blue"), replace(blue, colour="red"))
    assert is_correct(draw(pair, 64), both) and not is_correct(draw(swapped, 64), both)
    assert is_correct(draw(swapped, 64), replace(both, axis="two", colours_matter=False))


def test_every_shape_and_colour_is_found():
    for i, shape in enumerate(SHAPES):
        colour = list(COLOURS)[i % len(COLOURS)]
        (found,) = find_shapes(draw([Shape(shape, colour, 0.4, 0.4, 0.6)], 64))
        assert (found.shape, found.colour) == (shape, colour)
        assert found.x == pytest.approx(0.4, abs=0.03) and found.y == pytest.approx(0.6, abs=0.03)


def test_held_out_combinations_are_not_in_the_training_images(tmp_path):
    shapes.main([str(tmp_path / "shapes"), "--count", "120"])
    train, held_out = (ShardDataset(tmp_path / f"shapes/{s}-*.tar") for s in ("train", "heldout"))
    assert (len(train), len(held_out)) == (120, 6)
    for dataset, expected in ((train, False), (held_out, True)):
        for i in range(len(dataset)):
            scene = shapes.read_scene(dataset[i].meta["scene"], dataset[i].captions[0])
            assert scene.held_out == expected
            pairs = {(shape.colour, shape.shape) for shape in scene.shapes}
            assert expected or not any(is_held_out(*pair) for pair in pairs)
    axes = [dataset[i].meta["scene"]["axis"] for i in range(6)]
    assert axes == list(AXES)
    with pytest.raises(SystemExit, match="exists"):
        shapes.main([str(tmp_path / "shapes")])
    with pytest.raises(SystemExit, match="--count is 0; expected 1 to"):
        shapes.main([str(tmp_path / "others"), "--count", "0"])


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ("file", "cannot write file: file is not a directory"),
        ("out --count 0", "--count is 0; expected 1 to"),
        ("out --size 1000000", "--size is 1000000; expected 32 to 2048"),
        ("out --seed -1", "--seed is -1; expected 0 to"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, arguments, facts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"^error: {facts}"):
        shapes.main(arguments.split())
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_an_interrupted_command_leaves_no_images(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "describe", interrupt)
    with pytest.raises(SystemExit, match="interrupted; nothing was written"):
        shapes.main([str(tmp_path / "shapes"), "--count", "6"])
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    shapes.main([str(tmp_path / "shapes"), "--count", "6"])
    assert [folder.name for folder in tmp_path.iterdir()] == ["shapes"]


def test_only_the_chosen_kinds_of_scenes_are_drawn(tmp_path):
    shapes.main([str(tmp_path / "shapes"), "--count", "6", "--axes", "colour", "single"])
    for split, count in (("train", 6), ("heldout", 2)):
        dataset = ShardDataset(tmp_path / f"shapes/{split}-*.tar")
        scenes = [dataset[i].meta["scene"] for i in range(count)]
        assert [scene["axis"] for scene in scenes] == ["single", "colour"] * (count // 2)
        assert all(len(scene["shapes"]) == 1 for scene in scenes)
    summary = json.loads((tmp_path / "shapes/dataset.json").read_text())
    assert summary["axes"] == ["single", "colour"]


def test_the_command_scores_shapes(tiny_folder, tmp_path, capsys):
    shapes.main([str(tmp_path / "shapes"), "--count", "1"])
    arguments = (
        f"evaluate --model {tiny_folder} --data {tmp_path}/shapes/heldout-*.tar --steps 1 "
        f"--prior-candidates 1 --parts images --quiet --json {tmp_path}/e.json"
    )
    assert main(arguments.split()) == 0
    axes = json.loads((tmp_path / "e.json").read_text())["axes"]
    assert axes["generated"].keys() == axes["true"].keys() == set(AXES)
    assert axes["generated"]["count"]["images"] == 1
    assert "shapes as in the caption: attribution (1 images)" in capsys.readouterr().out
