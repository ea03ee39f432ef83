"""Icon sets in Iconify's JSON format: the `icons.json` of `@iconify-json/*` packages.

`icons.json` contains the body of an SVG for each name: {"prefix": ..., "icons": {name: {"body",
"width", "height"}}}. Two optional files in the same folder are `info.json` (author and licence) and
`chars.json` (names of code points).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclip.files import read_json

Entry = Mapping[str, Any]  # of emoji.json

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DEFAULT_SIDE = 16  # Iconify's, for icons without width or height


@dataclass(frozen=True)
class IconSet:
    """SVG texts by name, and the metadata of the set."""

    prefix: str  # the set's name in Iconify, e.g. "fluent-emoji-flat"
    icons: Mapping[str, str]  # name -> SVG
    aliases: Mapping[str, tuple[str, ...]]  # name -> other names of the same icon
    hexcodes: Mapping[str, str]  # name -> code points in hexadecimal, if the set lists them
    licence: str  # one line: title, author, licence, address


def find_icons(source: str | Path) -> Path | None:
    """Return the icons.json of a set, given as this file or its folder; None if there is none."""
    path = Path(source)
    file = path / "icons.json" if path.is_dir() else path
    return file if file.is_file() and file.suffix == ".json" else None


def read_icons(source: str | Path) -> IconSet:
    """Read a set from its icons.json or folder.

    Raises FileNotFoundError if there is none, and ValueError for a file in another format.
    """
    if (file := find_icons(source)) is None:
        raise FileNotFoundError(
            f"{source} contains no icons.json; expected an Iconify set, as in @iconify-json "
            "packages"
        )
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        icons = {name: _svg(icon, table) for name, icon in table["icons"].items()}
        prefix = str(table["prefix"])
        aliases: dict[str, tuple[str, ...]] = {}
        for name, alias in (table.get("aliases") or {}).items():
            if set(alias) == {"parent"}:  # the others are rotated or mirrored
                aliases[alias["parent"]] = (*aliases.get(alias["parent"], ()), name)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is not in Iconify's format; expected "
            f'{{"prefix": ..., "icons": {{name: {{"body": ...}}}}}} ({error!r})'
        ) from None
    chars = _read_optional(file.with_name("chars.json"))
    hexcodes = {name: code.upper() for code, name in chars.items()}
    licence = _licence(prefix, _read_optional(file.with_name("info.json")))
    return IconSet(prefix, icons, aliases, hexcodes, licence)


def _svg(icon: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    width, height = (icon.get(side, table.get(side, DEFAULT_SIDE)) for side in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    box = f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}"'
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"<svg {names} {box}>{icon['body']}</svg>"


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _licence(prefix: str, info: Mapping[str, Any]) -> str:
    author, licence = info.get("author"), info.get("license")
    author = author if isinstance(author, dict) else {"name": author}  # older sets have texts
    licence = licence if isinstance(licence, dict) else {"title": licence}
    parts = [info.get("name", prefix), author.get("name"), licence.get("title"), author.get("url")]
    return ", ".join(part for part in parts if part)


def slug(text: str) -> str:
    """Join the lower-case ASCII words of a text: "man: light skin" -> "man-light-skin"."""
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9#*]+", "-", plain.replace("'", "")).strip("-")


class EmojiNames:
    """Matches the names of icons to the entries of emoji.json.

    Names follow the CLDR annotations of different years: slugs with or without hyphens; "flag-for-"
    for flags, "digit-one" for keycaps, "letter-a" for regional indicators; skin tones with or
    without the words "skin tone".
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._by_code: dict[str, Entry] = {}
        self._by_slug: dict[str, Entry] = {}
        self._by_letters: dict[str, Entry] = {}
        for entry in entries:
            self._by_code[_without_selector(entry["hexcode"])] = entry
            for text in (entry["annotation"], *entry.get("shortcodes", [])):
                self._by_slug.setdefault(slug(text), entry)
        for name, entry in self._by_slug.items():
            self._by_letters.setdefault(name.replace("-", ""), entry)

    def find(
        self, name: str, aliases: Iterable[str] = (), hexcode: str | None = None
    ) -> Entry | None:
        """Return the entry of an icon; None if none matches. Code points precede names."""
        if hexcode and (entry := self._by_code.get(_without_selector(hexcode))):
            return entry
        candidates = [form for text in (name, *aliases) for form in _spellings(text)]
        by_slug = [self._by_slug.get(form) for form in candidates]
        by_letters = [self._by_letters.get(form.replace("-", "")) for form in candidates]
        return next((entry for entry in by_slug + by_letters if entry), None)


def named_entry(name: str) -> dict[str, Any]:
    """Return an entry for an icon that matches no emoji: its annotation is the name in words."""
    return {"annotation": name.replace("-", " ").replace("_", " ").strip(), "hexcode": name}


def _spellings(name: str) -> list[str]:
    """Return the slugs that the annotation of this name may have, the most likely first."""
    forms = [name]
    if name.startswith("flag-for-"):
        forms.append("flag-" + name.removeprefix("flag-for-").removeprefix("flag-"))
    word = name.removeprefix("digit-")
    if word in DIGITS:
        forms.append(f"keycap-{DIGITS.index(word)}")
    if name.startswith("letter-"):
        forms.append(f"regional-indicator-{name.removeprefix('letter-')}")
    forms += [name.removesuffix("-face"), f"{name}-face"]
    if name.endswith(tuple(f"-{tone}" for tone in TONES)):
        forms.append(f"{name}-skin-tone")
    return forms


def _without_selector(hexcode: str) -> str:
    """Return code points in upper case, without the variation selector for emoji."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")
