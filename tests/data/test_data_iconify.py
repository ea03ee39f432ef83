import json

import pytest

from unclip.data.emoji import find_emoji, main
from unclip.data.iconify import EmojiNames, find_icons, named_entry, read_icons, slug
from unclip.data.shards import ShardDataset

CIRCLE = '<circle cx="{0}" cy="{0}" r="{1}" fill="{2}"/>'
ENTRIES = [
    {"annotation": "red apple", "hexcode": "1F34E", "tags": ["fruit"], "group": 4},
    {"annotation": "bear", "hexcode": "1F43B", "group": 3},
    {"annotation": "flag: France", "hexcode": "1F1EB-1F1F7", "group": 9},
    {"annotation": "keycap: 4", "hexcode": "0034-FE0F-20E3", "group": 8},
    {
        "annotation": "waving hand: medium-dark skin tone",
        "hexcode": "1F44B-1F3FE",
        "group": 1,
        "tone": [4],
    },
]


def write_set(folder, prefix="round", side=10, **icons):
    folder.mkdir(parents=True)
    table = {"prefix": prefix, "icons": {name: {"body": body} for name, body in icons.items()}}
    (folder / "icons.json").write_text(json.dumps({**table, "width": side, "height": side}))
    return folder


@pytest.fixture
def checkout(tmp_path):
    """Write a checkout of svgmoji with one style, whose apple is a small red circle."""
    packages = tmp_path / "svgmoji" / "packages"
    (packages / "svgmoji").mkdir(parents=True)
    (packages / "svgmoji" / "emoji.json").write_text(json.dumps(ENTRIES))
    (packages / "svgmoji__plain" / "svg").mkdir(parents=True)
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10">'
    svg = f"{head}{CIRCLE.format(5, 2, 'red')}</svg>"
    (packages / "svgmoji__plain" / "svg" / "1F34E.svg").write_text(svg)
    return tmp_path / "svgmoji"


@pytest.mark.parametrize(
    ("name", "aliases", "hexcode"),
    [
        ("red-apple", (), "1F34E"),
        ("redapple", (), "1F34E"),
        ("bear-face", (), "1F43B"),
        ("teddy", ("bear",), "1F43B"),
        ("flag-for-france", (), "1F1EB-1F1F7"),
        ("flag-for-flag-france", (), "1F1EB-1F1F7"),
        ("digit-four", (), "0034-FE0F-20E3"),
        ("waving-hand-medium-dark", (), "1F44B-1F3FE"),
        ("waving-hand-medium-dark-skin-tone", (), "1F44B-1F3FE"),
        ("dark", (), None),
    ],
)
def test_different_spellings_match_an_emoji(name, aliases, hexcode):
    entry = EmojiNames(ENTRIES).find(name, aliases)
    assert (entry and entry["hexcode"]) == hexcode


def test_code_points_precede_names():
    assert EmojiNames(ENTRIES).find("bear", hexcode="34-20E3") is not None
    assert EmojiNames(ENTRIES).find("bear", hexcode="0034-20E3")["annotation"] == "keycap: 4"


def test_an_icon_set_is_another_style_of_a_checkout(checkout, tmp_path, capsys):
    icons = {"red-apple": CIRCLE.format(5, 4, "red"), "new-thing": CIRCLE.format(5, 4, "blue")}
    source = write_set(tmp_path / "icons", **icons)
    (source / "info.json").write_text(json.dumps({"name": "Round", "license": {"title": "MIT"}}))
    main([str(checkout), f"fancy={source}", str(tmp_path / "out"), "--size", "32", "--jobs", "1"])
    samples = {sample.key: sample for sample in ShardDataset(str(tmp_path / "out" / "*.tar"))}
    assert set(samples) == {"plain-1F34E", "fancy-1F34E", "fancy-new-thing"}
    assert samples["fancy-1F34E"].captions[0] == "red apple, fancy emoji"
    assert samples["fancy-new-thing"].captions[0] == "new thing, fancy emoji"
    assert "a blue new thing" in samples["fancy-new-thing"].captions
    assert samples["fancy-new-thing"].meta["colour"] == "blue"
    assert "- fancy: Round, MIT" in (tmp_path / "out" / "LICENSES.md").read_text()


def test_icons_without_a_checkout_are_captioned_by_their_names(tmp_path):
    source = write_set(tmp_path / "icons", **{"arrow-up": CIRCLE.format(5, 4, "red")})
    found, unknown = find_emoji(source / "icons.json")
    assert [(emoji.key, emoji.entry["annotation"]) for emoji in found] == [
        ("round-arrow-up", "arrow up")
    ]
    assert unknown == 0 and found[0].weight == 1


def test_duplicates_of_a_checkout_are_left_out(checkout, tmp_path, capsys):
    source = write_set(
        tmp_path / "icons",
        **{"red-apple": CIRCLE.format(5, 2, "red"), "bear": CIRCLE.format(5, 2, "red")},
    )
    main([str(checkout), str(source), str(tmp_path / "out"), "--size", "32", "--jobs", "1"])
    assert "1 duplicates" in capsys.readouterr().out
    keys = {sample.key for sample in ShardDataset(str(tmp_path / "out" / "*.tar"))}
    assert keys == {"plain-1F34E", "round-1F43B"}


def test_errors_name_the_style_or_the_file(checkout, tmp_path):
    source = write_set(tmp_path / "icons", **{"red-apple": CIRCLE.format(5, 4, "red")})
    with pytest.raises(ValueError, match="two sources contain plain-1F34E.*STYLE=PATH"):
        find_emoji(checkout, f"plain={source}")
    (tmp_path / "other.json").write_text('{"icons": [1]}')
    with pytest.raises(ValueError, match="other.json.*Iconify's format"):
        read_icons(tmp_path / "other.json")
    assert find_icons(checkout) is None
    with pytest.raises(FileNotFoundError, match="contains no icons.json"):
        read_icons(checkout)


def test_aliases_that_mirror_an_icon_are_ignored(tmp_path):
    source = write_set(tmp_path / "icons", left="<g/>")
    table = json.loads((source / "icons.json").read_text())
    table["aliases"] = {"west": {"parent": "left"}, "right": {"parent": "left", "hFlip": True}}
    (source / "icons.json").write_text(json.dumps(table))
    assert read_icons(source).aliases == {"left": ("west",)}


def test_names_become_slugs_and_annotations():
    assert (
        slug("man: light skin tone") == "man-light-skin-tone"
        and slug("Côte d’Ivoire") == "cote-divoire"
    )
    assert named_entry("arrow-up_left") == {
        "annotation": "arrow up left",
        "hexcode": "arrow-up_left",
    }


def test_author_and_licence_may_be_texts_as_in_older_sets(tmp_path):
    source = write_set(tmp_path / "icons", apple=CIRCLE.format(5, 4, "red"))
    (source / "info.json").write_text(json.dumps({"author": "A. Painter", "license": "MIT"}))
    assert read_icons(source).licence == "round, A. Painter, MIT"


@pytest.mark.parametrize("name", ["info.json", "chars.json"])
def test_the_error_of_a_damaged_optional_file_names_it(tmp_path, name):
    source = write_set(tmp_path / "icons", apple=CIRCLE.format(5, 4, "red"))
    (source / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is not valid JSON"):
        read_icons(source)
