"""Render emoji and icon sets to captioned tar shards, train and held out.

python -m unclip.data.emoji svgmoji data/emoji
python -m unclip.data.emoji svgmoji fluent=fluent-emoji-flat emojione/icons.json data/emoji
python -m unclip.data.emoji my_icons.json data/icons

A source is a checkout of github.com/svgmoji/svgmoji, or an icon set in Iconify's JSON format: its
icons.json, or the folder that contains it, as in @iconify-json packages. STYLE=PATH sets the style
word in the captions of a set; the default is the set's prefix. The names of icons are matched to
the emoji of the checkout. An icon without a match is captioned by its name, so that any set can be
rendered, with or without a checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from unclip.config import save_json
from unclip.data.colours import main_colour
from unclip.data.duplicates import find_duplicates, thumbnail
from unclip.data.everyday import everyday_captions, synonyms, with_article
from unclip.data.iconify import EmojiNames, find_icons, named_entry, read_icons
from unclip.data.shards import ShardWriter
from unclip.extras import import_extra
from unclip.files import atomic_folder, check_new_folder, exit_on_error
from unclip.image_io import open_image

GROUPS = (  # in the order of emojibase's group numbers, which emoji.json uses
    "smileys & emotion",
    "people & body",
    "component",
    "animals & nature",
    "food & drink",
    "travel & places",
    "activities",
    "objects",
    "symbols",
    "flags",
)
FLAG_WEIGHT = 0.5  # else flags have 13 % of the weight, and learning them helps no other images
MAX_BROKEN = 0.01

LICENCES = {
    "noto": "Noto Emoji, copyright Google LLC, Apache License 2.0 "
    "(flags: public domain or exempt), https://github.com/googlefonts/noto-emoji",
    "blob": "Blobmoji, copyright Google LLC and C1710, Apache License 2.0, "
    "https://github.com/C1710/blobmoji",
    "twemoji": "Twemoji graphics, copyright Twitter, Inc and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), https://github.com/twitter/twemoji",
}


@dataclass(frozen=True)
class Emoji:
    """An SVG of one style and its entry in emoji.json."""

    style: str
    svg: Path | str  # a file, or the SVG text itself
    entry: Mapping[str, Any]
    weight: float
    synonyms: tuple[str, ...] = ()
    rank: int = 0  # of its source; among duplicates, those with the lowest rank are kept

    @property
    def hexcode(self) -> str:
        return self.entry["hexcode"]

    @property
    def name(self) -> str:
        """Name in error messages."""
        return str(self.svg) if isinstance(self.svg, Path) else self.key

    @property
    def key(self) -> str:
        return f"{self.style}-{self.hexcode}".replace(".", "_")  # shards end a key at a dot


def digest(style: str, hexcode: str) -> bytes:
    """Return the sha256 of "style/hexcode", which determines the split and the order."""
    return hashlib.sha256(f"{style}/{hexcode}".encode()).digest()


def is_held_out(style: str, hexcode: str) -> bool:
    """Return True for the 5 % of images that are never trained on."""
    return digest(style, hexcode)[0] < 13


def phrase(annotation: str) -> str:
    """Turn an annotation into a phrase: "man: white hair" -> "a man with white hair"."""
    head, _, rest = annotation.partition(": ")
    if not rest:
        return with_article(head)
    if head == "flag":
        return f"flag of {rest}"
    if head == "keycap":
        return f"keycap {rest}"
    if all(part.endswith(("skin tone", "hair", "beard")) for part in rest.split(", ")):
        return f"{with_article(head)} with {rest}"
    return annotation


def captions(entry: Mapping[str, Any], style: str) -> list[str]:
    """Return all captions, without duplicates; the canonical one, for evaluation, is first."""
    annotation, tags = entry["annotation"], entry.get("tags", [])
    text = phrase(annotation)
    found = [
        f"{annotation}, {style} emoji",
        f"{text} in {style} style",
        f"{style} emoji of {text}",
        text,
        annotation,
    ]
    if tags:
        found.append(f"{annotation}: {', '.join(tags)}, {style} emoji")
    if "group" in entry:
        found.append(f"{GROUPS[entry['group']]} emoji, {annotation}, {style}")
    # A single tag, or tags without the skin tone, do not identify an image.
    if len(tags) > 1 and "tone" not in entry:
        found.append(f"{', '.join(tags)}, {style}")
    return list(dict.fromkeys(found))


def concept_weights(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the sampling weight of each hexcode.

    The skin-tone variants of a concept (5, or 25 for two people) have a total weight of 1.
    """
    variants_of = {
        hexcode: len(entry["skins"]) for entry in entries for hexcode in entry.get("skins", [])
    }

    def weight(entry: dict[str, Any]) -> float:
        if "tone" in entry:
            return 1 / variants_of.get(entry["hexcode"], 5)
        return FLAG_WEIGHT if entry.get("group") == GROUPS.index("flags") else 1.0

    return {entry["hexcode"]: weight(entry) for entry in entries}


def find_emoji(*sources: str | Path) -> tuple[list[Emoji], int]:
    """Return all images of the sources, shuffled by hash, and the number of SVGs without an entry.

    A source is a checkout of svgmoji, or an Iconify set as PATH or STYLE=PATH. Files of a checkout
    without an entry in emoji.json are left out; icons of a set get an entry of their own. Raises
    FileNotFoundError or ValueError for sources in another format and for a repeated style.
    """
    found, entries, unknown = [], [], 0
    for source in sources:
        if _icon_source(source) is None:
            images, table, without = _read_checkout(Path(source))
            found, entries, unknown = found + images, entries + table, unknown + without
    weights, tags, names = concept_weights(entries), synonyms(entries), EmojiNames(entries)
    for rank, source in enumerate(sources, start=1):
        if icon_source := _icon_source(source):
            icons = _read_set(*icon_source, names, weights, tags)
            found += [replace(icon, rank=rank) for icon in icons]
    keys = Counter(emoji.key for emoji in found)
    if repeated := [key for key, count in keys.items() if count > 1]:
        raise ValueError(
            f"two sources contain {repeated[0]}; expected different styles, set with STYLE=PATH"
        )
    found.sort(key=lambda emoji: digest(emoji.style, emoji.hexcode))
    return found, unknown


def _icon_source(source: str | Path) -> tuple[str | None, Path] | None:
    """Return style (None = the set's prefix) and icons.json of a set; None if it is not a set."""
    style, equals, path = str(source).partition("=")
    if equals and (file := find_icons(path)):
        return style, file
    file = find_icons(source)
    return (None, file) if file else None


def _read_checkout(svgmoji: Path) -> tuple[list[Emoji], list[dict[str, Any]], int]:
    """Return the images with an entry in emoji.json, all entries, and the number without one."""
    packages = svgmoji / "packages"
    table = packages / "svgmoji" / "emoji.json"
    folders = sorted(packages.glob("svgmoji__*/svg"))
    missing = [str(table)] if not table.is_file() else []
    if not any(next(folder.glob("*.svg"), None) for folder in folders):
        missing.append(str(packages / "svgmoji__<style>" / "svg" / "*.svg"))
    if missing:
        raise FileNotFoundError(
            f"{svgmoji} is neither a checkout of github.com/svgmoji/svgmoji nor an Iconify set: "
            f"missing icons.json, or {', '.join(missing)}"
        )
    try:
        entries = json.loads(table.read_text(encoding="utf-8"))
        entries = [entry for entry in entries if entry["annotation"]]
        by_hexcode = {entry["hexcode"]: entry for entry in entries}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{table}: expected a list of entries with hexcode and annotation ({error!r})"
        ) from None
    weights, tags = concept_weights(entries), synonyms(entries)
    known, unknown = [], 0
    for folder in folders:
        style = folder.parent.name.removeprefix("svgmoji__")
        for path in folder.glob("*.svg"):
            if entry := by_hexcode.get(code := path.stem):
                known.append(Emoji(style, path, entry, weights[code], tuple(tags.get(code, ()))))
            else:
                unknown += 1
    if not known:
        raise ValueError(
            f"{table}: none of the {unknown} SVG files has an entry; "
            "expected file names like 1F34E.svg"
        )
    return known, entries, unknown


def _read_set(
    style: str | None,
    file: Path,
    names: EmojiNames,
    weights: Mapping[str, float],
    tags: Mapping[str, Sequence[str]],
) -> list[Emoji]:
    """Return the icons of an Iconify set, the first one for each emoji."""
    icons = read_icons(file)
    found: dict[str, Emoji] = {}
    for name, svg in icons.icons.items():
        entry = names.find(name, icons.aliases.get(name, ()), icons.hexcodes.get(name))
        entry = entry or named_entry(name)
        code, prefix = entry["hexcode"], style or icons.prefix
        emoji = Emoji(prefix, svg, entry, weights.get(code, 1.0), tuple(tags.get(code, ())))
        found.setdefault(code, emoji)
    return list(found.values())


def render(svg: str | Path, size: int) -> bytes:
    """Render an SVG file or text to a square RGB PNG on white. Raises ValueError if it is broken.

    No fonts are used, so that the output does not depend on the machine. Text elements, which 1 %
    of the files have, are not rendered.
    """
    import resvg_py

    is_file = isinstance(svg, Path)
    rendered = resvg_py.svg_to_bytes(
        svg_string=None if is_file else svg,
        svg_path=str(svg) if is_file else None,
        width=size,
        height=size,
        background="#ffffff",
        skip_system_fonts=True,
    )
    image = open_image(io.BytesIO(rendered))
    if image.size != (size, size):  # resvg keeps the proportions
        image.thumbnail((size, size))
        square = Image.new("RGB", (size, size), "white")
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = square
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def _render_or_error(emoji: Emoji, size: int) -> bytes | str:
    try:
        return render(emoji.svg, size)
    except (ValueError, OSError) as error:
        return f"{emoji.name}: {error}"


def render_all(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    size: int = 256,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Render all images into `out`, which appears when it is complete; return dataset.json.

    sources: one or several, see `find_emoji`. Duplicates are left out: see duplicates.py.
    Raises FileNotFoundError or ValueError for a wrong layout, an existing `out`, or over 1 % broken
    SVGs.
    """
    out = Path(out)
    if size < 8:
        raise ValueError(f"--size is {size}; expected at least 8 pixels")
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs is {jobs}; expected at least 1")
    check_new_folder(out)
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    found, unnamed = find_emoji(*sources)
    import_extra("resvg_py", "data", "rendering")
    licences = _licences(sorted({emoji.style for emoji in found}), sources)
    with atomic_folder(out) as folder:
        rendered, broken = _render_each(found, size, jobs)
        counts, duplicates = _write(rendered, folder)
        names = {"without_entry": unnamed, "duplicates": duplicates, "broken": broken}
        summary = {"size": size, **counts, **names}
        save_json(summary, folder / "dataset.json")
        (folder / "LICENSES.md").write_text(licences, encoding="utf-8")
    return summary


def _render_each(
    found: Sequence[Emoji], size: int, jobs: int | None
) -> tuple[list[tuple[Emoji, bytes]], list[str]]:
    """Return emoji with PNGs, and errors of broken SVGs. Raises ValueError above 1 % of errors."""
    images: list[tuple[Emoji, bytes]] = []
    broken: list[str] = []
    with ProcessPoolExecutor(jobs) as pool:
        results = pool.map(partial(_render_or_error, size=size), found, chunksize=16)
        try:
            for emoji, result in zip(
                found, tqdm(results, total=len(found), unit=" images"), strict=True
            ):
                if isinstance(result, bytes):
                    images.append((emoji, result))
                    continue
                broken.append(result)
                if len(broken) > MAX_BROKEN * len(found):
                    raise ValueError(
                        f"over {MAX_BROKEN:.0%} of {len(found)} SVGs are broken, e.g. {broken[0]}"
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return images, broken


def _write(
    rendered: Sequence[tuple[Emoji, bytes]], out: Path
) -> tuple[dict[str, Counter[str]], int]:
    """Write the shards; return the images of each split by style, and the number of duplicates."""
    held_out = [is_held_out(emoji.style, emoji.hexcode) for emoji, _ in rendered]
    codes, ranks = [emoji.hexcode for emoji, _ in rendered], [emoji.rank for emoji, _ in rendered]
    left_out = find_duplicates(codes, ranks, held_out, [thumbnail(image) for _, image in rendered])
    counts: dict[str, Counter[str]] = {"train": Counter(), "heldout": Counter()}
    with ShardWriter(out, "train") as train, ShardWriter(out, "heldout") as heldout:
        for index, (emoji, image) in enumerate(rendered):
            if index not in left_out:
                writer = heldout if held_out[index] else train
                writer.write(emoji.key, {"png": image, **_describe(emoji, image)})
                counts["heldout" if held_out[index] else "train"][emoji.style] += 1
    return counts, len(left_out)


def _describe(emoji: Emoji, image: bytes) -> dict[str, Any]:
    entry, style, annotation = emoji.entry, emoji.style, emoji.entry["annotation"]
    colour = None
    if "tone" not in entry:  # else the captions name the colour of the skin
        small = open_image(io.BytesIO(image)).resize((32, 32))
        colour = main_colour(np.asarray(small))
    texts = captions(entry, style)
    texts += everyday_captions(phrase(annotation), annotation, style, colour, emoji.synonyms)
    return {
        "txt": texts[0],
        "json": {
            "captions": list(dict.fromkeys(texts)),
            "style": style,
            "hexcode": emoji.hexcode,
            "annotation": annotation,
            "colour": colour,
            "group": GROUPS[entry["group"]] if "group" in entry else None,
            "subgroup": entry.get("subgroup"),  # emojibase's number
            "tone": entry.get("tone"),
            "weight": emoji.weight,
        },
    }


def _licences(styles: Sequence[str], sources: Sequence[str | Path]) -> str:
    licences = dict(LICENCES)
    for style, file in filter(None, map(_icon_source, sources)):
        icons = read_icons(file)
        licences[style or icons.prefix] = icons.licence
    lines = [f"- {style}: {licences.get(style, 'see its source')}" for style in styles]
    source = (
        "Images rendered from the vector files of https://github.com/svgmoji/svgmoji and of "
        "Iconify's sets:"
    )
    names = "Names and tags: emojibase (MIT), after Unicode CLDR (Unicode License)."
    return "\n".join(["# Licences and attribution", "", source, "", *lines, "", names, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.emoji",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="checkout of github.com/svgmoji/svgmoji, or [STYLE=]PATH of an Iconify set",
    )
    parser.add_argument("out", metavar="OUT", help="new folder for train-*.tar and heldout-*.tar")
    parser.add_argument(
        "--size", type=int, default=256, help="image side in pixels (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    with exit_on_error("interrupted; nothing was written"):
        summary = render_all(options.sources, options.out, options.size, options.jobs)
    counts = {split: sum(summary[split].values()) for split in ("train", "heldout")}
    print(f"{options.out}: {counts['train']} training images, {counts['heldout']} held out")
    print(f"{summary['duplicates']} duplicates of another style are left out")
    print(
        f"{summary['without_entry']} SVGs have no entry in emoji.json, "
        f"{len(summary['broken'])} are broken"
    )
    for name in summary["broken"]:
        print(f"broken: {name}")


if __name__ == "__main__":
    main()
