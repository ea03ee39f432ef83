import io

import numpy as np
import pytest
from PIL import Image

from unclip.data.augment import can_recolour, is_held_out_colour, recolour, recolour_to_all
from unclip.data.colours import (
    CHROMATIC,
    COLOURS,
    main_colour,
    recolour_caption,
    rotate_hue,
    rotations_by_colour,
)
from unclip.data.duplicates import find_duplicates
from unclip.data.everyday import everyday_captions, synonyms, with_article
from unclip.data.loader import Augment, DataConfig, Loader
from unclip.data.samples import Sample

RGB = {
    "red": (221, 46, 68),
    "orange": (244, 144, 12),
    "brown": (121, 85, 72),
    "yellow": (255, 204, 77),
    "green": (67, 160, 71),
    "blue": (30, 136, 229),
    "purple": (142, 36, 170),
    "pink": (244, 171, 186),
    "black": (30, 30, 30),
    "grey": (140, 145, 145),
}


def square(colour, side=32):
    """Return a square of one colour on white."""
    image = np.full((side, side, 3), 255, np.uint8)
    image[8:24, 8:24] = RGB[colour]
    return image


@pytest.mark.parametrize("colour", [name for name in COLOURS if name != "white"])
def test_the_main_colour_is_measured(colour):
    assert main_colour(square(colour)) == colour


def test_an_image_of_many_colours_or_none_has_no_main_colour():
    image = square("red")
    image[8:14, 8:24], image[14:19, 8:24] = RGB["blue"], RGB["green"]
    assert main_colour(image) is None and main_colour(np.full((8, 8, 3), 255, np.uint8)) is None


def test_greys_have_no_hue_to_rotate():
    assert main_colour(rotate_hue(square("red"), 120)) == "green"
    grey = square("grey")
    assert np.abs(rotate_hue(grey, 90).astype(int) - grey).max() <= 8
    assert np.abs(rotate_hue(square("blue"), 360).astype(int) - square("blue")).max() <= 1


@pytest.mark.parametrize(
    ("caption", "noun", "old", "expected"),
    [
        ("a red apple in noto style", "red apple", "red", "a blue apple in noto style"),
        ("an apple, noto emoji", "apple", "red", "a blue apple, noto emoji"),
        ("fruit, noto", "apple", "red", "fruit, noto, blue"),
    ],
)
def test_captions_name_the_new_colour(caption, noun, old, expected):
    assert recolour_caption(caption, noun, old, "blue") == expected
    assert recolour_caption("a red ball", "ball", "red", "orange") == "an orange ball"


def test_the_caption_names_the_measured_colour():
    meta = {"annotation": "red apple", "colour": "red", "group": "food & drink"}
    rng = np.random.default_rng(0)
    found = [recolour(square("red"), ["a red apple"], meta, rng) for _ in range(10)]
    for image, (caption,) in filter(None, found):
        assert caption in (f"a {main_colour(image)} apple", f"an {main_colour(image)} apple")
    assert any(found)
    assert not can_recolour(meta | {"group": "flags"}) and not can_recolour(meta | {"tone": [1]})
    assert not can_recolour(meta | {"colour": None}) and not can_recolour({})
    assert recolour(square("red"), ["a flag"], meta | {"group": "flags"}, rng) is None


@pytest.mark.parametrize("side", [32, 256])
def test_the_middle_rotation_of_each_colour_is_found(side):
    image = square("red").repeat(side // 32, axis=0).repeat(side // 32, axis=1)
    found = rotations_by_colour(image)
    assert "red" not in found and {"yellow", "green", "blue", "purple"} <= set(found)
    for colour, degrees in found.items():
        assert main_colour(rotate_hue(image, degrees)) == colour
    for degrees in (-30, 30):  # green and blue have wide ranges
        assert main_colour(rotate_hue(image, found["green"] + degrees)) == "green"
        assert main_colour(rotate_hue(image, found["blue"] + degrees)) == "blue"
    assert rotations_by_colour(np.full((8, 8, 3), 128, np.uint8)) == {}


def test_an_image_is_returned_in_every_colour_that_is_not_held_out():
    meta = {"annotation": "red apple", "colour": "red", "group": "food & drink"}
    copies = recolour_to_all(square("red"), ["a red apple", "fruit"], meta)
    colours = [main_colour(image) for image, _ in copies]
    held_out = {colour for colour in CHROMATIC if is_held_out_colour(colour, "red apple")}
    assert held_out and set(colours) == set(rotations_by_colour(square("red"))) - held_out
    assert [captions[1] for _, captions in copies] == [f"fruit, {colour}" for colour in colours]
    assert recolour_to_all(square("red"), ["a flag"], meta | {"group": "flags"}) == []


class _Squares:
    """A dataset of red squares with the metadata that recolouring reads."""

    weights = np.ones(8)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        png = io.BytesIO()
        Image.fromarray(square("red")).save(png, "PNG")
        return Sample(
            str(index),
            ["a red ball"],
            png.getvalue,
            meta={"annotation": "red ball", "colour": "red"},
        )


def batch(recolour, workers=0):
    config = DataConfig("squares", 32, 8, augment=Augment(recolour=recolour), workers=workers)
    return next(iter(Loader(config, _Squares())))


def test_the_loader_recolours_reproducibly():
    assert set(batch(0.0)["caption"]) == {"a red ball"}
    some, again = batch(0.9), batch(0.9)
    assert some["caption"] == again["caption"] and (some["image"] == again["image"]).all()
    assert len(set(some["caption"])) > 2
    for image, caption in zip(some["image"], some["caption"], strict=True):
        pixels = ((image.numpy() + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
        assert main_colour(pixels) in caption


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [
        ("hourglass", "an hourglass"),
        ("x-ray", "an x-ray"),
        ("ukulele", "a ukulele"),
        ("unicorn", "a unicorn"),
        ("smiling face with sunglasses", "a smiling face with sunglasses"),
        ("scissors", "scissors"),
        ("Statue of Liberty", "Statue of Liberty"),
    ],
)
def test_articles(noun, phrase):
    assert with_article(noun) == phrase


def test_everyday_captions_contain_colours_and_synonyms():
    found = everyday_captions("a banana", "banana", "noto", "yellow", ["plantain"])
    assert {
        "a yellow banana",
        "a picture of a banana",
        "plantain",
        "a yellow banana in noto style",
    } <= set(found)
    assert "an apple" in everyday_captions("a red apple", "red apple", "noto", "red")
    assert "the letter B" in everyday_captions(
        "B button (blood type)", "B button (blood type)", "noto"
    )
    assert not any(
        "red red" in caption
        for caption in everyday_captions("a red apple", "red apple", "noto", "red")
    )


def test_rare_tags_are_synonyms():
    entries = [
        {"annotation": f"thing {i}", "hexcode": str(i), "tags": ["thing", f"own {i}"]}
        for i in range(5)
    ]
    assert synonyms(entries)["3"] == ["own 3"]


def test_duplicates_of_held_out_images_are_left_out():
    red, blue = (np.asarray(square(c), np.float32) / 127.5 - 1 for c in ("red", "blue"))
    assert find_duplicates(["a", "a", "a"], [0, 0, 1], [True, False, False], [red, red, red]) == {
        1,
        2,
    }
    assert find_duplicates(["a", "a"], [0, 1], [False, True], [red, red]) == {1}
    assert (
        find_duplicates(["a", "a", "b"], [0, 0, 1], [True, False, False], [red, blue, red]) == set()
    )
    assert find_duplicates(["a", "a"], [0, 0], [False, False], [red, red]) == set()
