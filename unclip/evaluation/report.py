"""Results of evaluations as tables, in plain text or Markdown; torch is not imported."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Row(NamedTuple):
    figure: str
    value: str
    reference: str = ""  # the same figure of a baseline


FEW_IMAGES = 10_000  # below, the Fréchet distance is visibly biased
HEAD = Row("figure", "model", "reference")


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns by spaces."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


# -- `unclip evaluate`


def evaluation_rows(results: dict[str, Any]) -> list[Row]:
    """Return the rows of `Evaluation.run`; parts that were not run are left out."""
    baseline = results.get("baseline", "")
    parts = [part for part in _EVALUATION_ROWS if part in results]
    return [row for part in parts for row in _EVALUATION_ROWS[part](results[part], baseline)]


def _references(values: dict[str, float], form: str, baseline: str) -> str:
    names = {"baseline": baseline, "true": "true images"}
    return "; ".join(f"{name} {values[of]:{form}}" for of, name in names.items() if of in values)


def _prior(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    names = {"matching": "matching captions", "mismatched": "mismatched captions", "gap": "gap"}
    for key, name in names.items():
        reference = f"text embedding {part['text_cosine'][key]:.3f}"
        figure = f"prior: cosine to the true embedding, {name}"
        yield Row(figure, f"{part['cosine'][key]:.3f}", reference)
    mse = f"{part['normalised_mse']:.3f}"
    yield Row("prior: mean squared error, normalised", mse, "1 for a constant mean")


def _recall(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    for name, group in part["groups"].items():
        count = f"{group['images']} images, {group['captions']} captions"
        for metric, value in group["generated"].items():
            same = {of: group[of][metric] for of in ("baseline", "true") if of in group}
            figure = f"{metric} of the caption, {name} ({count})"
            yield Row(figure, f"{value:.1%}", _references(same, ".1%", baseline))
    cosine = part["caption_cosine"]
    reference = _references(cosine, ".3f", baseline)
    yield Row("CLIP cosine to the caption", f"{cosine['generated']:.3f}", reference)


def _with_interval(value: dict[str, Any]) -> str:
    low, high = value["interval"]
    return f"{value['mean']:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _means(part: dict[str, Any], figure: str, baseline: str) -> tuple[str, str]:
    """Return the generated images' mean with its interval, and the references."""
    references = [f"true images {part['true'][figure]['mean']:.1%}"]
    if "baseline" in part:
        references.insert(0, f"{baseline} {_with_interval(part['baseline'][figure])}")
    return _with_interval(part["generated"][figure]), "; ".join(references)


def _axes(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    for axis, value in part["generated"].items():
        figure = f"shapes as in the caption: {axis} ({value['images']} images)"
        yield Row(figure, *_means(part, axis, baseline))


def _judge(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    names = {"concept@1": "concept", "concept@5": "concept among five", "style": "style"}
    for figure in part["generated"]:
        yield Row(f"judge: {names[figure]}", *_means(part, figure, baseline))


def _colours(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    names = {"colour": "colour", "concept": "concept (judge)", "both": "both"}
    for key, name in names.items():
        figure = f"unseen combinations of colour and concept: {name} ({part['images']} images)"
        yield Row(figure, *_means(part, key, baseline))


def _judged_variations(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    if part["images"]:
        figure = f"judge: variations keep the concept ({part['images']} images)"
        yield Row(figure, _with_interval(part), "of true images that the judge names right")


def _distances(part: dict[str, Any], count: int, features: str, baseline: str) -> Iterator[Row]:
    """Return the rows of `distribution_distances`; count: number of images."""
    few = count < FEW_IMAGES
    names = {
        "fd": ("Fréchet distance", " (too large below 10,000 images)" if few else "", ".3f"),
        "kd": ("kernel distance", " (noisy below 10,000 images)" if few else "", ".3g"),
        "precision": ("precision", "", ".3f"),
        "recall": ("recall", "", ".3f"),
    }
    for key, value in part["generated"].items():
        if key in names:
            name, caveat, form = names[key]
            others = {of: part[of][key] for of in ("baseline", "true") if key in part.get(of, {})}
            reference = _references(others, form, baseline)
            yield Row(f"{features}: {name}{caveat}", f"{value:{form}}", reference)


def _realism(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    # Results of development versions lack the number; all of them had few images.
    yield from _distances(part, part.get("images", 0), "judge's features", baseline)


def _features(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    images, what = part["images"], f"{part['size']} px, {part['extractor']}"
    count = images["generated"]
    if "reference" in images:
        what = f"{what}, to {images['reference'] or 'saved statistics of'} reference images"
    yield from _distances(part, count, f"{count} final images, {what}", baseline)
    if "clip_score" in part["generated"]:
        scores = {of: part[of]["clip_score"] for of in ("baseline", "true") if of in part}
        score = f"{part['generated']['clip_score']:.2f}"
        yield Row("CLIP score of the final images", score, _references(scores, ".2f", baseline))


def _style(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    for name, group in part.items():
        figure = f"style as in the prompt, {name} ({group['images']} images)"
        yield Row(figure, f"{group['generated']:.1%}", _references(group, ".1%", baseline))


def _diversity(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    figure = f"CLIP distance between {part['seeds']} images of one prompt"
    others = f"of different prompts {part['of_different_prompts']:.3f}"
    yield Row(f"{figure} ({part['prompts']} prompts)", f"{part['of_one_prompt']:.3f}", others)


def _nearest(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    for kind, unit in {"clip": "CLIP distance", "pixels": "pixel RMS, of 2"}.items():
        median, same = part[kind]["median_distance"], part[kind]["same_concept"]
        figures = f"nearest training image, median {unit}", f"... has the same concept ({kind})"
        for figure, values, form in zip(figures, (median, same), (".3f", ".1%"), strict=True):
            reference = f"true images {values['true']:{form}}"
            yield Row(figure, f"{values['generated']:{form}}", reference)
    figure = "nearer to the unseen true image than to any training image"
    yield Row(figure, f"{part['nearer_to_truth']:.1%}")


def _candidates(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    for count, values in part["by_count"].items():
        figure = f"CLIP score, best of {count} ({part['captions']} captions)"
        to_truth = f"cosine to the true image {values['cosine_to_truth']:.3f}"
        reference = f"{to_truth}; recall@1 {values['recall@1']:.1%}"
        yield Row(figure, f"{values['clip_score']:.3f}", reference)


def _codec(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    yield Row("codec alone: PSNR", f"{part['psnr']:.2f} dB")
    yield Row("codec alone: SSIM", f"{part['ssim']:.3f}")
    if "high_band_error" in part:
        energy = f"energy {part['high_band_energy']:.1%} of the true images"
        error = f"{part['high_band_error']:.1%}"
        yield Row("codec alone: error of the finest details", error, energy)
    perplexity = f"perplexity {part['perplexity']:.0f}"
    yield Row("codec alone: codes in use", f"{part['usage']:.1%}", perplexity)


def _bound(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    names = ("pixels", "codes", "text")
    terms = ", ".join(f"{name} {part['bits_of_dim'][name]:.3f}" for name in names)
    figure = "image and caption, upper bound in bits per value of an image"
    yield Row(figure, f"{8 + part['bits_per_dim']:.3f}", f"minus 8: {terms}")
    yield Row("bits per image code", f"{part['bits_per_code']:.2f}")
    yield Row("bits per text token, including padding", f"{part['bits_per_token']:.2f}")


def _decoder(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    for level, value in part["x0_mse"].items():
        yield Row(f"decoder alone: squared error of x_0 at t = {level} T", f"{value:.4f}")
    yield Row("decoder alone: squared error of x_0, mean of these", f"{part['mean_x0_mse']:.4f}")


def _upsampler(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    psnr, figure = part["psnr"], f"upsampler alone, {part['from']} to {part['to']} px: PSNR"
    reference = f"bicubic {psnr['bicubic']:.2f} dB"
    yield Row(f"{figure} ({part['images']} images)", f"{psnr['upsampled']:.2f} dB", reference)


def _repeatable(part: dict[str, Any], baseline: str) -> Iterator[Row]:
    answer = {True: "yes", False: "no"}
    yield Row("same seed, same bytes", answer[part["same_seed_same_bytes"]])
    difference = f"{part['batch_and_alone_differ_by']}/255"
    yield Row("largest difference between alone and in a batch", difference)
    yield Row("from its metadata, same bytes", answer[part["from_metadata_same_bytes"]])


_EVALUATION_ROWS = {
    "prior": _prior,
    "recall": _recall,
    "axes": _axes,
    "judge": _judge,
    "colours": _colours,
    "variations": _judged_variations,
    "realism": _realism,
    "features": _features,
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
EVALUATION_RESULTS = tuple(_EVALUATION_ROWS)


# -- `unclip evaluate-manipulations`


def manipulation_rows(results: dict[str, Any]) -> list[Row]:
    """Return the rows of the parts of `ManipulationEvaluation` that were run."""
    parts = [part for part in _MANIPULATION_ROWS if part in results]
    return [row for part in parts for row in _MANIPULATION_ROWS[part](results[part])]


def _by_number(part: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in part.items() if isinstance(value, dict))


def _reconstruction(part: dict[str, Any]) -> Iterator[Row]:
    for name, value in part["psnr"].items():
        figure = f"reconstruction, {name} ({part['images']} images, {part['steps']} steps)"
        yield Row(figure, f"{value['mean']:.1f} dB", f"minimum {value['minimum']:.1f} dB")
    large = part["upsampled"]
    figure = f"... with upsamplers, {large['size']} px ({large['images']} images)"
    yield Row(figure, f"{large['psnr']:.1f} dB")


def _variations(part: dict[str, Any]) -> Iterator[Row]:
    for eta, values in _by_number(part):
        reference = f"cosine to the source {values['cosine']:.3f}"
        figure = f"variations, eta {eta}: pixel RMS, of 2"
        yield Row(figure, f"{values['pixel_rms']:.3f}", reference)
    yield Row("cosine of random pairs of images", f"{part['random_pairs']:.3f}")


def _interpolation(part: dict[str, Any]) -> Iterator[Row]:
    figure = "interpolation: difference between ends and reconstructions"
    yield Row(figure, f"{part['ends_differ_by']}/255")
    figure = "... largest step over mean step, by cosine of the given embeddings"
    yield Row(figure, f"{part['largest_step_of_embeddings']:.2f}")
    for name, frames in (("plain", "frames"), ("even", "frames in even steps")):
        step = part["largest_step"][name]
        within = f"{step['within_twice']:.0%} of {part['paths']} paths within twice"
        reference = f"maximum {step['maximum']:.2f}; {within}"
        yield Row(f"... the same for {frames}", f"{step['mean']:.2f}", reference)


def _text_diff(part: dict[str, Any]) -> Iterator[Row]:
    for eta, values in _by_number(part):
        figure = f"text diff, eta {eta}: monotone towards the target ({part['cases']} cases)"
        given = f"given embeddings {values['monotone_embeddings']:.0%}"
        reference = f"rising steps {values['rising_steps']:.0%}; {given}"
        yield Row(figure, f"{values['monotone']:.0%}", reference)
        for theta, target in values["cosine_to_target"].items():
            source = f"to the source {values['cosine_to_source'][theta]:.3f}"
            yield Row(f"... theta {theta}: cosine to the target", f"{target:.3f}", source)


def _pca(part: dict[str, Any]) -> Iterator[Row]:
    for k, values in part["by_count"].items():
        explained = f"{k} components, {values['explained']:.0%} of the variance"
        figure = f"{explained}: recall@1 of {part['captions']} captions"
        reference = f"cosine to the full embedding {values['cosine']:.3f}"
        yield Row(figure, f"{values['recall@1']:.1%}", reference)
    yield Row("the full embedding", f"{part['full']['recall@1']:.1%}")


def _inpainting(part: dict[str, Any]) -> Iterator[Row]:
    reference = f"true images {part['seam_of_true_images']:.1f}"
    for name in ("fine-tuned", "fine-tuned, unguided", "training-free", "pasted"):
        if (values := part.get(name)) is None:
            continue
        method = "pasting from a whole image" if name == "pasted" else f"inpainting, {name}"
        recall, random = f"{values['recall@1']:.1%}", f"random {part['random']:.1%}"
        yield Row(f"{method}: recall@1 of the prompt in the hole", recall, random)
        yield Row(f"{method}: seam, of 255", f"{values['seam']:.1f}", reference)
        if "seam_of_own_caption" in values:
            own = f"{values['seam_of_own_caption']:.1f}"
            yield Row("... the same for the image's own caption", own, reference)
        difference = f"{values['kept_differs_by']}/255"
        yield Row(f"{method}: largest difference of kept pixels", difference)


_MANIPULATION_ROWS = {
    "reconstruction": _reconstruction,
    "variations": _variations,
    "interpolation": _interpolation,
    "text_diff": _text_diff,
    "pca": _pca,
    "inpainting": _inpainting,
}


# -- `unclip evaluate-priors`


def prior_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows of `PriorComparison` as Markdown."""
    columns = {  # key: head, format
        "guidance": ("guidance", "g"),
        "cosine": ("cosine to the true one", ".3f"),
        "gap": ("gap to mismatched", ".3f"),
        "recall@1": ("recall@1 of the image", ".1%"),
        "cosine_of_seeds": ("cosine between 8 seeds", ".3f"),
        "milliseconds": ("ms", ".0f"),
    }
    table = [("embedding from", "parameters", *(head for head, _ in columns.values()))]
    for row in rows:
        size = f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else ""
        cells = (format(row[key], form) if key in row else "" for key, (_, form) in columns.items())
        table.append((row["name"], size, *cells))
    return markdown_table(table)


# -- `unclip evaluate-approximations`


def approximation_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of one row of `ApproximationError`."""
    speed = ""
    if "seconds" in row:
        own, exact = row["seconds"], row["exact_seconds"]
        ratios = [b / a for a, b in zip(own, exact, strict=True)]
        ratio = statistics.median(exact) / statistics.median(own)
        speed = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    pixels, cosine, recall = row["pixels"], row["cosine"], row["recall@1"]
    return row["name"], speed, f"{pixels:.2f}", f"{cosine:.4f}", f"{recall:.1%}"


def approximation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows of `ApproximationError` as Markdown."""
    head = "speed-up", "pixel difference, of 255", "CLIP cosine to the exact"
    return markdown_table([("", *head, "recall@1 of the caption"), *map(approximation_cells, rows)])
