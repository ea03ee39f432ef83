"""Held-out combinations of colour and concept: their images, and the judgement of images."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw

from unclip.data.colours import main_colour
from unclip.data.shards import ShardWriter
from unclip.evaluation import colours
from unclip.evaluation.judge import Verdict
from unclip.evaluation.pairs import load_pairs
from unclip.image_io import encode_image


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A red apple, and a waving hand, whose colour has a meaning."""
    monkeypatch.setattr(colours, "is_held_out_colour", lambda colour, concept: colour == "blue")
    image = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(image).ellipse((4, 4, 27, 27), fill=(210, 30, 40))
    samples = {
        "apple": {"annotation": "red apple", "colour": "red"},
        "wave": {"annotation": "waving hand", "colour": "yellow", "tone": [1]},
    }
    with ShardWriter(tmp_path, "heldout") as writer:
        for name, meta in samples.items():
            caption = f"{meta['annotation']}, noto emoji"
            files = {"png": encode_image(image), "json": {"captions": [caption], **meta}}
            writer.write(name, files)
    return load_pairs(tmp_path / "heldout-*.tar", 32, progress=False)


class Recorder:
    """Stand-in for a judge that is always right; it records its inputs."""

    def judge(self, images, pairs):
        self.images, self.pairs = images, pairs
        hits = torch.ones(len(pairs), dtype=torch.bool)
        return Verdict(hits, hits, None, torch.zeros(len(pairs)))


def test_only_images_that_make_sense_in_another_colour_are_combined(pairs):
    (wanted,) = colours.combinations(pairs)
    assert (wanted.row, wanted.colour) == (0, "blue")
    assert wanted.pair.caption == "blue apple, noto emoji"
    assert wanted.pair.concept == "red apple"
    (image,) = colours.true_images(pairs, [wanted])
    assert main_colour(colours.to_array(image.add(1).mul(127.5).byte())) == "blue"


def test_the_judge_sees_the_original_colours(pairs):
    wanted, judge = colours.combinations(pairs), Recorder()
    blue, red = colours.true_images(pairs, wanted), pairs.floats([0])
    figures = colours.judge_colours(blue, wanted, judge)
    assert figures["colour"].all() and figures["concept"].all() and figures["both"].all()
    assert (judge.images - red).abs().mean() < 0.05
    assert [pair.concept for pair in judge.pairs] == ["red apple"]
    figures = colours.judge_colours(red, wanted, judge)
    assert not figures["colour"].any() and not figures["both"].any()
