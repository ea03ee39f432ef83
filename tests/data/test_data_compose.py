"""Composed images show what their captions say."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from test_data_augment import RGB, square

from unclip.data.compose import (
    BACKGROUNDS,
    COUNTS,
    RELATIONS,
    change_background,
    compose,
    foreground,
    is_held_out,
    name_object,
    plural,
    repeat,
)
from unclip.data.loader import Augment, DataConfig, Loader
from unclip.data.samples import Sample

RED, BLUE = square("red", 64), square("blue", 64)


def pixels_of(image: np.ndarray, colour: str) -> np.ndarray:
    """Return rows and columns (N, 2) of the pixels of about this colour."""
    return np.argwhere(np.abs(image.astype(int) - RGB[colour]).max(axis=-1) < 40)


def samples(function, *arguments, count=60):
    """Return the images by caption; combinations that are held out give None."""
    rng = np.random.default_rng(0)
    results = [function(*arguments, rng) for _ in range(count)]
    return {caption: image for image, caption in filter(None, results)}


def test_relations_are_those_of_the_caption():
    found = samples(compose, (RED, BLUE), ("a red square", "a blue square"))
    relations = {
        caption.removeprefix("a red square ").removesuffix(" a blue square") for caption in found
    }
    allowed = {name for name in RELATIONS if not is_held_out(name, "a red square", "a blue square")}
    assert relations == allowed and len(allowed) >= 5
    for caption, image in found.items():
        (red_y, red_x), (y, x) = (pixels_of(image, name).mean(axis=0) for name in ("red", "blue"))
        relation = caption.removeprefix("a red square ").removesuffix(" a blue square")
        expected = {
            "next to": abs(red_x - x) > 20 and abs(red_y - y) < 4,
            "to the left of": x - red_x > 20,
            "to the right of": red_x - x > 20,
            "above": y - red_y > 20,
            "below": red_y - y > 20,
            "on top of": y - red_y > 15,
            "inside": abs(red_x - x) < 4 and len(pixels_of(image, "blue")) > 400,
        }
        assert expected[relation], caption
    on_top = found.get("a red square on top of a blue square")
    if on_top is not None:  # they touch
        assert (
            abs(pixels_of(on_top, "red").max(axis=0)[0] - pixels_of(on_top, "blue").min(axis=0)[0])
            <= 3
        )


def test_counts_are_those_of_the_caption():
    found = samples(repeat, RED, "a red square")
    assert len(found) >= 3
    for caption, image in found.items():
        mask, count = foreground(image), 0
        while mask.any():  # remove one object after the other
            count += 1
            part = np.zeros_like(mask)
            part[tuple(np.argwhere(mask)[0])] = True
            for _ in range(200):
                grown = part.copy()
                for axis in (0, 1):
                    for step in (1, -1):
                        grown |= np.roll(part, step, axis)
                part = grown & mask
            mask &= ~part
        assert count == list(COUNTS).index(caption.split()[0]) + 2, caption
        assert caption.endswith(" red squares")


def test_backgrounds_surround_the_object():
    ring = np.full((64, 64, 3), 255, np.uint8)
    ring[16:48, 16:48] = RGB["red"]
    ring[24:40, 24:40] = 255  # white inside the object
    found = samples(change_background, ring, "a ring")
    named = {caption for caption in found if caption != "a ring"}
    assert "a ring" in found and len(named) >= 6
    for caption in named:
        colour = caption.removesuffix(" background").split()[-1]
        image = found[caption]
        assert (image[:15] == BACKGROUNDS[colour]).all() and (image[26:38, 26:38] == 255).all()
        assert np.abs(image[18:22, 18:22].astype(int) - RGB["red"]).max() == 0


def test_some_combinations_are_held_out():
    share = np.mean([is_held_out("above", str(a), str(b)) for a in range(40) for b in range(40)])
    assert 0.08 < share < 0.13
    pairs = [(f"a {i}", f"a {j}") for i in range(6) for j in range(6)]
    small = square("red", 32), square("blue", 32)
    captions = {caption for names in pairs for caption in samples(compose, small, names, count=20)}
    held_out = {
        f"{a} {name} {b}" for a, b in pairs for name in RELATIONS if is_held_out(name, a, b)
    }
    assert held_out and not captions & held_out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a red apple", "red apples"),
        ("an ox", "oxes"),
        ("a berry", "berries"),
        ("glasses", "glasses"),
    ],
)
def test_plurals(name, expected):
    assert plural(name) == expected


def test_objects_are_named_by_annotation_or_caption():
    assert name_object("apple, noto emoji", {"annotation": "apple"}) == "an apple"
    assert name_object("a photo of a cat", {}) == "a photo of a cat"


class Squares:
    weights = np.ones(8)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        colour, png = list(RGB)[index], io.BytesIO()
        Image.fromarray(square(colour)).save(png, "PNG")
        return Sample(colour, [f"a {colour} square"], png.getvalue)


def batches(**augment):
    config = DataConfig("squares", 32, 8, augment=Augment(**augment))
    loader = Loader(config, Squares(), num_processes=1, process_index=0)
    return [batch for _ in range(4) for batch in loader]


def test_a_loader_composes_and_repeats_itself():
    first, again = batches(compose=0.5, background=0.5), batches(compose=0.5, background=0.5)
    captions = [caption for batch in first for caption in batch["caption"]]
    assert captions == [caption for batch in again for caption in batch["caption"]]
    assert all((a["image"] == b["image"]).all() for a, b in zip(first, again, strict=True))
    words = " ".join(captions)
    assert "background" in words and "squares" in words
    assert any(relation in words for relation in RELATIONS)
    plain = [caption for batch in batches() for caption in batch["caption"]]
    assert not any("background" in caption for caption in plain)
    unchanged = [a == b for a, b in zip(captions, plain, strict=True)]
    assert 5 < sum(unchanged) < 30  # the order of the samples does not change
