"""Captions in everyday language: without a style, with articles, colours and synonyms."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unclip.data.colours import COLOURS

RARE = 3  # a tag that at most this many emoji have is a synonym
PLAIN_WORDS = re.compile(r"[a-z][a-z '-]*")  # annotations that a colour can precede
VOWEL_SOUNDS = ("a", "e", "i", "o", "u", "hour", "honest", "heir", "x-")
CONSONANT_SOUNDS = ("uni", "us", "ut", "uk", "eu", "one")
LETTER = re.compile(r"regional indicator (\w)|(\w\w?) button \(blood type\)")


def with_article(noun: str) -> str:
    """Add an article: "a red apple". Plurals, proper names and numbers are unchanged."""
    head = noun.split(" with ")[0]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is"))
    if plural or not noun[:1].islower():
        return noun
    vowel_sound = noun.startswith(VOWEL_SOUNDS) and not noun.startswith(CONSONANT_SOUNDS)
    return f"{'an' if vowel_sound else 'a'} {noun}"


def synonyms(entries: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the synonyms of each hexcode: rare tags that are not words of its annotation."""
    plain = [entry for entry in entries if "tone" not in entry and entry.get("annotation")]
    counts = Counter(tag for entry in plain for tag in set(entry.get("tags", [])))
    return {
        entry["hexcode"]: [
            tag
            for tag in entry.get("tags", [])
            if counts[tag] <= RARE and tag not in entry["annotation"].split()
        ]
        for entry in plain
    }


def everyday_captions(
    phrase: str, annotation: str, style: str, colour: str | None = None, others: Sequence[str] = ()
) -> list[str]:
    """Return captions, without duplicates, of an image of `annotation`.

    phrase: the annotation as a phrase ("a red apple"). colour: of the image; it precedes
    annotations that are plain words without a colour. others: synonyms.
    """
    found = [
        f"a picture of {phrase}",
        f"an icon of {phrase}",
        f"a drawing of {phrase}",
        f"{phrase}, emoji",
    ]
    if match := LETTER.fullmatch(annotation):
        letter = match[1] or match[2]
        found += [f"the letter {letter}", f"letter {letter} in {style} style"]
    words = annotation.split()
    if colour and PLAIN_WORDS.fullmatch(annotation) and not set(words) & set(COLOURS):
        coloured = with_article(f"{colour} {annotation}")
        found += [coloured, f"{coloured} in {style} style", f"{colour} {annotation}"]
    if len(words) > 1 and words[0] in COLOURS:  # a red apple is an apple
        found.append(with_article(" ".join(words[1:])))
    for name in others[:3]:
        found += [name, f"{name}, {style} emoji"]
    return list(dict.fromkeys(found))
