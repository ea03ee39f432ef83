"""The figures of an evaluation as rows of a table, plain or Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Row(NamedTuple):
    what: str
    value: str
    beside: str = ""  # the same figure of a reference


def rows(results: dict[str, Any]) -> list[Row]:
    """The figures of `Evaluation.run`, in the order of the stages; parts that were not run are left out."""
    other = results.get("beside", "")
    return [
        row
        for part, tell in _PARTS.items()
        if part in results
        for row in tell(results[part], other)
    ]


def plain(table: Sequence[Row]) -> str:
    """Columns aligned by spaces."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
    return "\n".join(lines)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


HEAD = Row("figure", "model", "reference")


def _references(figures: dict[str, float], form: str, other: str) -> str:
    """The same figure of the true pictures, and of another model's."""
    beside = f"{other} {figures['beside']:{form}}; " if "beside" in figures else ""
    return f"{beside}true pictures {figures['true']:{form}}"


def _prior(part: dict[str, Any], other: str) -> Iterator[Row]:
    names = {"matching": "matching captions", "mismatched": "mismatched captions", "gap": "gap"}
    for key, name in names.items():
        yield Row(
            f"prior: cosine to the true embedding, {name}",
            f"{part['cosine'][key]:.3f}",
            f"text embedding {part['cosine_of_text'][key]:.3f}",
        )
    yield Row(
        "prior: mean squared error, normalised",
        f"{part['normalised_mse']:.3f}",
        "1 if it always gave the mean",
    )


def _recall(part: dict[str, Any], other: str) -> Iterator[Row]:
    for name, group in part["groups"].items():
        for figure, value in group["drawn"].items():
            what = f"{figure} of the caption, {name} ({group['pictures']} pictures, {group['captions']} captions)"
            same = {of: group[of][figure] for of in ("beside", "true") if of in group}
            yield Row(what, f"{value:.1%}", _references(same, ".1%", other))
    cosine = part["caption_cosine"]
    yield Row(
        "CLIP cosine to the caption", f"{cosine['drawn']:.3f}", _references(cosine, ".3f", other)
    )


def _style(part: dict[str, Any], other: str) -> Iterator[Row]:
    for name, group in part.items():
        what = f"style drawn = style asked for, {name} ({group['pictures']} pictures)"
        yield Row(what, f"{group['drawn']:.1%}", _references(group, ".1%", other))


def _diversity(part: dict[str, Any], other: str) -> Iterator[Row]:
    what = (
        f"CLIP distance between {part['seeds']} pictures of one prompt ({part['prompts']} prompts)"
    )
    yield Row(
        what,
        f"{part['of_one_prompt']:.3f}",
        f"of different prompts {part['of_different_prompts']:.3f}",
    )


def _nearest(part: dict[str, Any], other: str) -> Iterator[Row]:
    for kind, unit in {"clip": "CLIP distance", "pixels": "pixel RMS, of 2"}.items():
        median, same = part[kind]["median_distance"], part[kind]["same_concept"]
        what = f"nearest training picture, median {unit}"
        yield Row(what, f"{median['drawn']:.3f}", f"true pictures {median['true']:.3f}")
        yield Row(
            f"... is of the same concept ({kind})",
            f"{same['drawn']:.1%}",
            f"true pictures {same['true']:.1%}",
        )
    yield Row(
        "nearer to the unseen truth than to any training picture", f"{part['nearer_to_truth']:.1%}"
    )


def _candidates(part: dict[str, Any], other: str) -> Iterator[Row]:
    for count, found in part["of"].items():
        what = f"CLIP score, best of {count} ({part['captions']} captions)"
        beside = (
            f"to the true picture {found['cosine_to_truth']:.3f}; recall@1 {found['recall@1']:.1%}"
        )
        yield Row(what, f"{found['clip_score']:.3f}", beside)


def _codec(part: dict[str, Any], other: str) -> Iterator[Row]:
    yield Row("codec alone: PSNR", f"{part['psnr']:.2f} dB")
    yield Row("codec alone: SSIM", f"{part['ssim']:.3f}")
    energy = f"its energy {part['high_band_energy']:.1%} of the true"
    yield Row("codec alone: error of the finest details", f"{part['high_band_error']:.1%}", energy)
    yield Row(
        "codec alone: codes in use", f"{part['usage']:.1%}", f"perplexity {part['perplexity']:.0f}"
    )


def _bound(part: dict[str, Any], other: str) -> Iterator[Row]:
    terms = part["bits_of_dim"]
    told = ", ".join(f"{name} {terms[name]:.3f}" for name in ("pixels", "codes", "text"))
    what = "picture and caption, in bits per value of a picture, at most"
    yield Row(what, f"{8 + part['bits_per_dim']:.3f}", f"less 8: {told}")
    yield Row("bits of an image code", f"{part['bits_per_code']:.2f}")
    yield Row("bits of a text token, padding included", f"{part['bits_per_token']:.2f}")


def _decoder(part: dict[str, Any], other: str) -> Iterator[Row]:
    for level, value in part["x0_mse"].items():
        yield Row(f"decoder alone: squared error of x_0 at t = {level} T", f"{value:.4f}")
    yield Row("decoder alone: squared error of x_0, mean of these", f"{part['mean_x0_mse']:.4f}")


def _upsampler(part: dict[str, Any], other: str) -> Iterator[Row]:
    what = f"upsampler alone, {part['from']} to {part['to']} px: PSNR ({part['pictures']} pictures)"
    yield Row(
        what, f"{part['psnr']['upsampled']:.2f} dB", f"bicubic {part['psnr']['bicubic']:.2f} dB"
    )


def _repeatable(part: dict[str, Any], other: str) -> Iterator[Row]:
    answer = {True: "yes", False: "no"}
    yield Row("same seed, same bytes", answer[part["same_seed_same_bytes"]])
    yield Row(
        "largest difference between alone and in a batch",
        f"{part['batch_and_alone_differ_by']}/255",
    )
    yield Row("redrawn from its metadata, same bytes", answer[part["redrawn_same_bytes"]])


_PARTS = {
    "prior": _prior,
    "recall": _recall,
    "style": _style,
    "diversity": _diversity,
    "nearest": _nearest,
    "candidates": _candidates,
    "codec": _codec,
    "bound": _bound,
    "decoder": _decoder,
    "upsampler": _upsampler,
    "repeatable": _repeatable,
}
