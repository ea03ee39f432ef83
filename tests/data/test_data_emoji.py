import io
import json
import tarfile
from collections import Counter

import pytest
from PIL import Image

from unclip.data.emoji import (
    captions,
    concept_weights,
    is_held_out,
    main,
    phrase,
    render,
    render_all,
)
from unclip.data.shards import ShardDataset

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} 10">{}</svg>'
CIRCLE = SVG.format(10, '<circle cx="5" cy="5" r="4" fill="{}"/>')
APPLE = {
    "annotation": "red apple",
    "hexcode": "1F34E",
    "tags": ["apple", "fruit", "red"],
    "group": 4,
    "subgroup": 41,
}
HAND = {
    "annotation": "waving hand",
    "hexcode": "1F44B",
    "group": 1,
    "skins": ["1F44B-1F3FB", "1F44B-1F3FC"],
}
LIGHT = {
    "annotation": "waving hand: light skin tone",
    "hexcode": "1F44B-1F3FB",
    "group": 1,
    "tags": ["a", "b"],
    "tone": [1],
}
FLAG = {"annotation": "flag: France", "hexcode": "1F1EB-1F1F7", "tags": ["FR", "flag"], "group": 9}


@pytest.fixture
def checkout(tmp_path):
    """Write two styles of two emoji and one SVG without an entry."""
    packages = tmp_path / "svgmoji" / "packages"
    (packages / "svgmoji").mkdir(parents=True)
    (packages / "svgmoji" / "emoji.json").write_text(json.dumps([APPLE, HAND, LIGHT, FLAG]))
    for style, color in (("plain", "red"), ("fancy", "blue")):
        (packages / f"svgmoji__{style}" / "svg").mkdir(parents=True)
        for hexcode in ("1F34E", "1F44B-1F3FB"):
            (packages / f"svgmoji__{style}" / "svg" / f"{hexcode}.svg").write_text(
                CIRCLE.format(color)
            )
    (packages / "svgmoji__plain" / "svg" / "US-MO.svg").write_text(CIRCLE.format("green"))
    return tmp_path / "svgmoji"


def test_a_checkout_becomes_captioned_shards(checkout, tmp_path, capsys):
    out = tmp_path / "out"
    main([str(checkout), str(out), "--size", "32", "--jobs", "1"])
    assert "1 SVGs have no entry" in capsys.readouterr().out
    samples = {sample.key: sample for sample in ShardDataset(str(out / "*.tar"))}
    assert set(samples) == {
        f"{style}-{code}" for style in ("plain", "fancy") for code in ("1F34E", "1F44B-1F3FB")
    }

    apple = samples["plain-1F34E"]
    assert apple.image.size == (32, 32)
    assert apple.image.getpixel((16, 16)) == (255, 0, 0)
    assert apple.image.getpixel((0, 0)) == (255, 255, 255)
    assert apple.captions[0] == "red apple, plain emoji" and apple.weight == 1
    expected = {"group": "food & drink", "style": "plain", "tone": None}
    assert expected.items() <= apple.meta.items()
    assert samples["fancy-1F44B-1F3FB"].weight == 0.5  # one of the two variants in `skins`

    summary = json.loads((out / "dataset.json").read_text())
    assert sum(summary["train"].values()) + sum(summary["heldout"].values()) == 4
    assert "plain: see its source" in (out / "LICENSES.md").read_text()


def test_the_splits_are_disjoint(checkout, tmp_path):
    svg = checkout / "packages" / "svgmoji__plain" / "svg"
    entries = [{"annotation": f"thing {i}", "hexcode": f"{i:05X}"} for i in range(60)]
    for entry in entries:
        (svg / f"{entry['hexcode']}.svg").write_text(CIRCLE.format("red"))
    (checkout / "packages" / "svgmoji" / "emoji.json").write_text(json.dumps(entries))
    render_all(checkout, tmp_path / "out", size=8, jobs=2)
    for split, expected in (("heldout", True), ("train", False)):
        for sample in ShardDataset(tmp_path / "out" / f"{split}-00000.tar"):
            assert is_held_out(sample.meta["style"], sample.meta["hexcode"]) is expected


def test_rendering_is_deterministic(checkout, tmp_path):
    for name in ("a", "b"):
        render_all(checkout, tmp_path / name, size=16, jobs=1)
    for path in (tmp_path / "a").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        names = Counter(member.rpartition(".")[2] for member in tarfile.open(path).getnames())
        assert names["png"] == names["txt"] == names["json"]


def test_five_percent_are_held_out():
    assert is_held_out("twemoji", "1F34E") is False and is_held_out("noto", "1F34E") is False
    held_out = sum(is_held_out("noto", f"{code:05X}") for code in range(4000))
    assert 0.04 < held_out / 4000 < 0.06


def test_other_aspect_ratios_are_centered_on_white(tmp_path):
    wide = tmp_path / "wide.svg"
    wide.write_text(SVG.format(20, '<rect width="20" height="10"/>'))
    image = Image.open(io.BytesIO(render(wide, 32)))
    column = [image.getpixel((16, y)) for y in range(32)]
    assert image.mode == "RGB" and image.size == (32, 32)
    assert column == [(255, 255, 255)] * 8 + [(0, 0, 0)] * 16 + [(255, 255, 255)] * 8


def test_an_emoji_has_several_captions():
    assert captions(APPLE, "twemoji") == [
        "red apple, twemoji emoji",
        "a red apple in twemoji style",
        "twemoji emoji of a red apple",
        "a red apple",
        "red apple",
        "red apple: apple, fruit, red, twemoji emoji",
        "food & drink emoji, red apple, twemoji",
        "apple, fruit, red, twemoji",
    ]
    toned = captions(LIGHT, "noto")
    assert "a waving hand with light skin tone in noto style" in toned
    assert all("light skin tone" in caption for caption in toned)
    bare = {"annotation": "grapes", "hexcode": "1F347"}
    assert captions(bare, "noto") == [
        "grapes, noto emoji",
        "grapes in noto style",
        "noto emoji of grapes",
        "grapes",
    ]


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ("eagle", "an eagle"),
        ("unicorn", "a unicorn"),
        ("octopus", "an octopus"),
        ("ATM sign", "ATM sign"),
        ("flag: France", "flag of France"),
        ("keycap: 5", "keycap 5"),
        ("man: white hair", "a man with white hair"),
        ("family: man, woman, boy", "family: man, woman, boy"),
    ],
)
def test_annotations_become_phrases(annotation, expected):
    assert phrase(annotation) == expected


def test_skin_tones_of_a_concept_share_its_weight():
    weights = concept_weights([APPLE, HAND, LIGHT, LIGHT | {"hexcode": "1F44B-1F3FC"}, FLAG])
    assert weights["1F44B-1F3FB"] + weights["1F44B-1F3FC"] == 1
    assert weights["1F34E"] == weights["1F44B"] == 1 and weights["1F1EB-1F1F7"] == 0.5


def test_few_broken_svgs_are_skipped_and_many_are_an_error(checkout, tmp_path):
    svg = checkout / "packages" / "svgmoji__plain" / "svg"
    entries = [{"annotation": "thing", "hexcode": f"{i:05X}"} for i in range(120)]
    (checkout / "packages" / "svgmoji" / "emoji.json").write_text(json.dumps(entries))
    for entry in entries:
        (svg / f"{entry['hexcode']}.svg").write_text(CIRCLE.format("red"))
    (svg / "00000.svg").write_text("<svg")
    summary = render_all(checkout, tmp_path / "one", size=8, jobs=1)
    assert len(summary["broken"]) == 1 and "00000.svg" in summary["broken"][0]
    assert sum(summary["train"].values()) + sum(summary["heldout"].values()) == 119
    (svg / "00001.svg").write_text("")
    with pytest.raises(ValueError, match="over 1% of 120 SVGs are broken"):
        render_all(checkout, tmp_path / "two", size=8, jobs=1)
    assert not list(tmp_path.glob("two*"))


def test_errors_name_the_file(checkout, tmp_path):
    with pytest.raises(SystemExit, match=r"emoji\.json.*svgmoji__<style>"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="exists; remove it"):
        main([str(checkout), str(checkout)])
    with pytest.raises(SystemExit, match="--jobs is 0; expected at least 1"):
        main([str(checkout), str(tmp_path / "out"), "--jobs", "0"])
    (checkout / "packages" / "svgmoji" / "emoji.json").write_text("[1]")
    with pytest.raises(SystemExit, match="expected a list of entries"):
        main([str(checkout), str(tmp_path / "out")])
