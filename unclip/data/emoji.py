"""Renders a checkout of github.com/svgmoji/svgmoji into captioned tar shards, split into train and held out.

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

from unclip.data.shards import ShardWriter

GROUPS = (  # the numbering of emojibase, which emoji.json follows
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
FLAG_WEIGHT = 0.5  # 13 % of the weight otherwise, and coats of arms say little about anything else
MAX_BROKEN = 0.01

LICENCES = {
    "noto": "Noto Emoji, copyright Google LLC, Apache License 2.0 (flags: public domain or exempt), "
    "https://github.com/googlefonts/noto-emoji",
    "blob": "Blobmoji, copyright Google LLC and C1710, Apache License 2.0, https://github.com/C1710/blobmoji",
    "twemoji": "Twemoji graphics, copyright Twitter, Inc and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), https://github.com/twitter/twemoji",
}


@dataclass(frozen=True)
class Emoji:
    """One picture to be drawn: a file of one style and its entry in emoji.json."""

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
    """sha256 of "style/hexcode": decides the split and the (shuffled) order."""
    return hashlib.sha256(f"{style}/{hexcode}".encode()).digest()


def is_held_out(style: str, hexcode: str) -> bool:
    """True for the 5 % of pictures that are never trained on."""
    return digest(style, hexcode)[0] < 13


def with_article(noun: str) -> str:
    """ "red apple" -> "a red apple"; plurals, proper names and numbers stay bare."""
    plural = noun.endswith("s") and not noun.endswith(("ss", "us", "is"))
    if plural or not noun[0].islower():
        return noun
    vowel_sound = noun[0] in "aeiou" and not noun.startswith(("uni", "us", "ut", "eu", "one"))
    return f"{'an' if vowel_sound else 'a'} {noun}"


def phrase(annotation: str) -> str:
    """The annotation as one would say it: "man: white hair" -> "a man with white hair"."""
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
    """Every caption of a picture, without repeats; the canonical one, used in all evaluations, comes first."""
    annotation, tags = entry["annotation"], entry.get("tags", [])
    spoken = phrase(annotation)
    found = [
        f"{annotation}, {style} emoji",
        f"{spoken} in {style} style",
        f"{style} emoji of {spoken}",
        spoken,
        annotation,
    ]
    if tags:
        found.append(f"{annotation}: {', '.join(tags)}, {style} emoji")
    if "group" in entry:
        found.append(f"{GROUPS[entry['group']]} emoji, {annotation}, {style}")
    if (
        len(tags) > 1 and "tone" not in entry
    ):  # one tag, or tags that leave out the skin tone, name no picture
        found.append(f"{', '.join(tags)}, {style}")
    return list(dict.fromkeys(found))


def concept_weights(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Sampling weight of each hexcode; a concept's skin-tone variants, 5 or for two people 25, weigh 1 together."""
    variants_of = {
        hexcode: len(entry["skins"]) for entry in entries for hexcode in entry.get("skins", [])
    }

    def weight(entry: dict[str, Any]) -> float:
        if "tone" in entry:
            return 1 / variants_of.get(entry["hexcode"], 5)
        return FLAG_WEIGHT if entry.get("group") == GROUPS.index("flags") else 1.0

    return {entry["hexcode"]: weight(entry) for entry in entries}


def find_emoji(svgmoji: str | Path) -> tuple[list[Emoji], int]:
    """All pictures of a checkout that have an entry in emoji.json, shuffled by hash; and how many have none."""
    packages = Path(svgmoji) / "packages"
    table = packages / "svgmoji" / "emoji.json"
    folders = sorted(packages.glob("svgmoji__*/svg"))
    missing = [str(table)] if not table.is_file() else []
    if not any(next(folder.glob("*.svg"), None) for folder in folders):
        missing.append(str(packages / "svgmoji__<style>" / "svg" / "*.svg"))
    if missing:
        raise FileNotFoundError(
            f"{svgmoji} is no checkout of github.com/svgmoji/svgmoji: missing {', '.join(missing)}"
        )
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
        raise ValueError(
            f"{table}: none of the {unknown} svg files has an entry; expected file names like 1F34E.svg"
        )
    known.sort(key=lambda emoji: digest(emoji.style, emoji.hexcode))
    return known, unknown


def render(path: str | Path, size: int) -> bytes:
    """An svg as an RGB PNG of size x size pixels, centred on white. Raises ValueError for a broken svg.

    No fonts are used, so every machine draws the same; writing kept as text, in 1 % of the files, is left out.
    """
    import resvg_py

    drawn = resvg_py.svg_to_bytes(
        svg_path=str(path), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    picture = Image.open(io.BytesIO(drawn)).convert("RGB")
    if picture.size != (size, size):  # resvg keeps the proportions
        picture.thumbnail((size, size))
        square = Image.new("RGB", (size, size), "white")
        square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
        picture = square
    png = io.BytesIO()
    picture.save(png, "PNG")
    return png.getvalue()


def _render_or_error(path: Path, size: int) -> bytes | str:
    try:
        return render(path, size)
    except (ValueError, OSError) as error:
        return f"{path}: {error}"


def render_all(
    svgmoji: str | Path, out: str | Path, size: int = 256, jobs: int | None = None
) -> dict[str, Any]:
    """Renders every emoji into `out`, which appears only when it is complete; returns what dataset.json says.

    Raises FileNotFoundError or ValueError for a wrong layout, an existing `out`, or over 1 % broken svgs.
    """
    out = Path(out)
    if size < 8:
        raise ValueError(f"--size is {size}; expected at least 8 pixels")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; remove it or choose another place")
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
        pictures = pool.map(
            partial(_render_or_error, size=size), [emoji.path for emoji in found], chunksize=16
        )
        try:
            for emoji, picture in zip(
                found, tqdm(pictures, total=len(found), unit=" pictures"), strict=True
            ):
                if isinstance(picture, str):
                    broken.append(picture)
                    if len(broken) > MAX_BROKEN * len(found):
                        raise ValueError(
                            f"over {MAX_BROKEN:.0%} of {len(found)} svgs are broken, e.g. {broken[0]}"
                        )
                    continue
                held_out = is_held_out(emoji.style, emoji.hexcode)
                (heldout if held_out else train).write(
                    emoji.key, {"png": picture, **_describe(emoji)}
                )
                counts["heldout" if held_out else "train"][emoji.style] += 1
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            shutil.rmtree(partial_out, ignore_errors=True)
            raise

    summary = {"size": size, **counts, "without_entry": unnamed, "broken": broken}
    (partial_out / "dataset.json").write_text(
        json.dumps(summary, indent=2) + "\n", encoding="utf-8"
    )
    (partial_out / "LICENSES.md").write_text(
        _licences(sorted({emoji.style for emoji in found})), encoding="utf-8"
    )
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
    source = "Pictures drawn from the vector files of https://github.com/svgmoji/svgmoji:"
    names = "Names and tags: emojibase (MIT), after Unicode CLDR (Unicode License)."
    return "\n".join(["# Licences and attribution", "", source, "", *lines, "", names, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.emoji", description=__doc__.split("\n")[0]
    )
    parser.add_argument("svgmoji", metavar="SVGMOJI", help="checkout of github.com/svgmoji/svgmoji")
    parser.add_argument(
        "out", metavar="OUT", help="folder to be made, for train-*.tar and heldout-*.tar"
    )
    parser.add_argument(
        "--size", type=int, default=256, help="pixels a side (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, help="processes (default: one for each core)")
    options = parser.parse_args(arguments)
    try:
        summary = render_all(options.svgmoji, options.out, options.size, options.jobs)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; nothing was written") from None
    counts = {split: sum(summary[split].values()) for split in ("train", "heldout")}
    print(f"{options.out}: {counts['train']} pictures to train on, {counts['heldout']} held out")
    print(
        f"{summary['without_entry']} svgs have no entry in emoji.json, {len(summary['broken'])} are broken"
    )
    for name in summary["broken"]:
        print(f"broken: {name}")


if __name__ == "__main__":
    main()
