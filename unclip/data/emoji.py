"""Render a checkout of github.com/svgmoji/svgmoji to captioned tar shards, train and held out.

python -m unclip.data.emoji SVGMOJI OUT
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from unclip.config import save_json
from unclip.data.shards import ShardWriter

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
FLAG_WEIGHT = 0.5  # else 13 % of the weight, and coats of arms help with nothing else
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
    """An SVG file of one style and its entry in emoji.json."""

    style: str
    path: Path
    entry: dict[str, Any]
    weight: float

    @property
    def hexcode(self) -> str:
        return self.path.stem

    @property
    def key(self) -> str:
        return f"{self.style}-{self.hexcode}"


def digest(style: str, hexcode: str) -> bytes:
    """Return the sha256 of "style/hexcode", which determines the split and the order."""
    return hashlib.sha256(f"{style}/{hexcode}".encode()).digest()


def is_held_out(style: str, hexcode: str) -> bool:
    """Return True for the 5 % of images that are never trained on."""
    return digest(style, hexcode)[0] < 13


def with_article(noun: str) -> str:
    """Add an article: "a red apple". Plurals, proper names and numbers are unchanged."""
    plural = noun.endswith("s") and not noun.endswith(("ss", "us", "is"))
    if plural or not noun[0].islower():
        return noun
    vowel_sound = noun[0] in "aeiou" and not noun.startswith(("uni", "us", "ut", "eu", "one"))
    return f"{'an' if vowel_sound else 'a'} {noun}"


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


def captions(entry: dict[str, Any], style: str) -> list[str]:
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


def find_emoji(svgmoji: str | Path) -> tuple[list[Emoji], int]:
    """Return the SVGs with an entry in emoji.json, shuffled by hash, and the number without."""
    packages = Path(svgmoji) / "packages"
    table = packages / "svgmoji" / "emoji.json"
    folders = sorted(packages.glob("svgmoji__*/svg"))
    missing = [str(table)] if not table.is_file() else []
    if not any(next(folder.glob("*.svg"), None) for folder in folders):
        missing.append(str(packages / "svgmoji__<style>" / "svg" / "*.svg"))
    if missing:
        fault = f"is not a checkout of github.com/svgmoji/svgmoji: missing {', '.join(missing)}"
        raise FileNotFoundError(f"{svgmoji} {fault}")
    try:
        entries = json.loads(table.read_text(encoding="utf-8"))
        by_hexcode = {entry["hexcode"]: entry for entry in entries if entry["annotation"]}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{table}: expected a list of entries with hexcode and annotation ({error!r})"
        ) from None
    weights = concept_weights(entries)
    known, unknown = [], 0
    for folder in folders:
        style = folder.parent.name.removeprefix("svgmoji__")
        for path in folder.glob("*.svg"):
            if entry := by_hexcode.get(path.stem):
                known.append(Emoji(style, path, entry, weights[path.stem]))
            else:
                unknown += 1
    if not known:
        names = "expected file names like 1F34E.svg"
        raise ValueError(f"{table}: none of the {unknown} SVG files has an entry; {names}")
    known.sort(key=lambda emoji: digest(emoji.style, emoji.hexcode))
    return known, unknown


def render(path: str | Path, size: int) -> bytes:
    """Render an SVG to a square RGB PNG, centered on white; ValueError if it is broken.

    No fonts are used, so that the output does not depend on the machine. Text elements, which 1 %
    of the files have, are not rendered.
    """
    import resvg_py

    rendered = resvg_py.svg_to_bytes(
        svg_path=str(path), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(rendered)).convert("RGB")
    if image.size != (size, size):  # resvg keeps the proportions
        image.thumbnail((size, size))
        square = Image.new("RGB", (size, size), "white")
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = square
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def _render_or_error(path: Path, size: int) -> bytes | str:
    try:
        return render(path, size)
    except (ValueError, OSError) as error:
        return f"{path}: {error}"


def render_all(
    svgmoji: str | Path, out: str | Path, size: int = 256, jobs: int | None = None
) -> dict[str, Any]:
    """Render every emoji into `out`, which appears when it is complete; return dataset.json.

    Raises FileNotFoundError or ValueError for a wrong layout, an existing `out`, or over 1 % broken
    SVGs.
    """
    out = Path(out)
    if size < 8:
        raise ValueError(f"--size is {size}; expected at least 8 pixels")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; remove it or choose another folder")
    found, unnamed = find_emoji(svgmoji)
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise ValueError("rendering needs resvg_py: pip install resvg_py") from None

    partial_out = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    partial_out.mkdir(parents=True)
    counts: dict[str, Counter[str]] = {"train": Counter(), "heldout": Counter()}
    broken: list[str] = []
    with (
        ProcessPoolExecutor(jobs or os.cpu_count()) as pool,
        ShardWriter(partial_out, "train") as train,
        ShardWriter(partial_out, "heldout") as heldout,
    ):
        renderer = partial(_render_or_error, size=size)
        images = pool.map(renderer, [emoji.path for emoji in found], chunksize=16)
        bar = tqdm(images, total=len(found), unit=" images")
        try:
            for emoji, image in zip(found, bar, strict=True):
                if isinstance(image, str):
                    broken.append(image)
                    if len(broken) > MAX_BROKEN * len(found):
                        count = f"over {MAX_BROKEN:.0%} of {len(found)} SVGs"
                        raise ValueError(f"{count} are broken, e.g. {broken[0]}")
                    continue
                held_out = is_held_out(emoji.style, emoji.hexcode)
                writer, split = (heldout, "heldout") if held_out else (train, "train")
                writer.write(emoji.key, {"png": image, **_describe(emoji)})
                counts[split][emoji.style] += 1
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            shutil.rmtree(partial_out, ignore_errors=True)
            raise

    summary = {"size": size, **counts, "without_entry": unnamed, "broken": broken}
    save_json(summary, partial_out / "dataset.json")
    licences = _licences(sorted({emoji.style for emoji in found}))
    (partial_out / "LICENSES.md").write_text(licences, encoding="utf-8")
    if out.exists():
        out.rmdir()
    partial_out.rename(out)
    return summary


def _describe(emoji: Emoji) -> dict[str, Any]:
    entry, texts = emoji.entry, captions(emoji.entry, emoji.style)
    return {
        "txt": texts[0],
        "json": {
            "captions": texts,
            "style": emoji.style,
            "hexcode": emoji.hexcode,
            "annotation": entry["annotation"],
            "group": GROUPS[entry["group"]] if "group" in entry else None,
            "subgroup": entry.get("subgroup"),  # emojibase's number
            "tone": entry.get("tone"),
            "weight": emoji.weight,
        },
    }


def _licences(styles: Sequence[str]) -> str:
    lines = [f"- {style}: {LICENCES.get(style, 'see its source')}" for style in styles]
    source = "Images rendered from the vector files of https://github.com/svgmoji/svgmoji:"
    names = "Names and tags: emojibase (MIT), after Unicode CLDR (Unicode License)."
    return "\n".join(["# Licences and attribution", "", source, "", *lines, "", names, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.emoji", description="Render the emoji of svgmoji."
    )
    parser.add_argument("svgmoji", metavar="SVGMOJI", help="checkout of github.com/svgmoji/svgmoji")
    parser.add_argument("out", metavar="OUT", help="new folder for train-*.tar and heldout-*.tar")
    parser.add_argument("--size", type=int, default=256, help="image side in pixels (256)")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    try:
        summary = render_all(options.svgmoji, options.out, options.size, options.jobs)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; nothing was written") from None
    counts = {split: sum(summary[split].values()) for split in ("train", "heldout")}
    print(f"{options.out}: {counts['train']} training images, {counts['heldout']} held out")
    unnamed, broken = summary["without_entry"], len(summary["broken"])
    print(f"{unnamed} SVGs have no entry in emoji.json, {broken} are broken")
    for name in summary["broken"]:
        print(f"broken: {name}")


if __name__ == "__main__":
    main()
