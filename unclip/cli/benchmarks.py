"""The folder layouts that the scorers of GenEval (2310.11513) and DPG-Bench (2403.05135) read."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.files import parse_json, read_text, replace_text, shorten, write_errors

if TYPE_CHECKING:
    from PIL import Image

IMAGES_PER_PROMPT = 4  # in both benchmarks


@dataclass(frozen=True)
class GenEvalPrompt:
    """A line of GenEval's metadata: FOLDER/00000/metadata.jsonl and samples/0000.png, ..."""

    prompt: str
    name: str
    line: str

    def first_image(self, output: Path) -> Path:
        return output / self.name / "samples" / "0000.png"

    def is_complete(self, output: Path, num_images: int) -> bool:
        """Return whether all images are there. ValueError for those of another command."""
        metadata, samples = output / self.name / "metadata.jsonl", output / self.name / "samples"
        if metadata.is_file() and read_text(metadata).strip() != self.line:
            raise ValueError(f"{metadata} is of another prompt; choose another folder")
        names = {f"{k:04}.png" for k in range(num_images)}
        found = {path.name for path in samples.glob("[0-9]*.png")}
        if more := sorted(found - names):
            raise ValueError(f"{samples / more[0]} is not one of {num_images} images; remove it")
        return metadata.is_file() and found == names

    def write(
        self, images: Sequence[Image.Image], entries: Sequence[dict[str, Any]], output: Path
    ) -> None:
        from unclip.image_io import save_png

        for k, (image, entry) in enumerate(zip(images, entries, strict=True)):
            path = output / self.name / "samples" / f"{k:04}.png"
            with write_errors(path):
                save_png(image, path, entry)
        replace_text(output / self.name / "metadata.jsonl", f"{self.line}\n")


@dataclass(frozen=True)
class DPGPrompt:
    """A prompt file NAME.txt of DPG-Bench: FOLDER/NAME.png with the images side by side."""

    prompt: str
    name: str

    def first_image(self, output: Path) -> Path:
        return output / f"{self.name}.png"

    def is_complete(self, output: Path, num_images: int) -> bool:
        return self.first_image(output).is_file()

    def write(
        self, images: Sequence[Image.Image], entries: Sequence[dict[str, Any]], output: Path
    ) -> None:
        from unclip.image_io import grid, save_png

        path = self.first_image(output)
        with write_errors(path):
            save_png(grid(images, 2, gap=0), path, list(entries))


BenchmarkPrompt = GenEvalPrompt | DPGPrompt


def geneval(text: str) -> list[GenEvalPrompt]:
    """Read GenEval's metadata, one JSON object with a prompt per line: the type of an argument."""
    try:
        lines = [line.strip() for line in read_text(text).splitlines() if line.strip()]
        prompts = []
        for i, line in enumerate(lines):
            value = parse_json(line)
            prompt = value.get("prompt") if isinstance(value, dict) else None
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"{text}: line {i + 1} has no prompt")
            prompts.append(GenEvalPrompt(prompt, f"{i:05}", line))
    except (ValueError, OSError) as error:
        expected = 'expected one JSON object with "prompt" per line'
        raise ArgumentTypeError(f"{error}; {expected}") from None
    if not prompts:
        raise ArgumentTypeError(f"{text} has no prompts; expected GenEval's metadata (.jsonl)")
    return prompts


def dpg_bench(text: str) -> list[DPGPrompt]:
    """Read DPG-Bench's folder of prompts, one NAME.txt for each: the type of an argument."""
    files = sorted(Path(text).glob("*.txt"))
    if not files:
        raise ArgumentTypeError(f"{text} has no .txt files; expected DPG-Bench's folder of prompts")
    try:
        prompts = [DPGPrompt(" ".join(read_text(file).split()), file.stem) for file in files]
    except (ValueError, OSError) as error:
        raise ArgumentTypeError(f"{error}; expected one prompt per file") from None
    if empty := [one.name for one in prompts if not one.prompt]:
        raise ArgumentTypeError(f"{text}/{empty[0]}.txt is empty; expected a prompt")
    return prompts


def check_resumed(path: Path, num_images: int, expected: Mapping[str, Any]) -> None:
    """Raise ValueError unless a file of an earlier command has the same settings.

    num_images: that the file shows. expected: entries of the metadata of the first one.
    """
    from unclip.image_io import read_metadata

    entries = read_metadata(path)
    if len(entries) != num_images:
        raise ValueError(f"{path} shows {len(entries)} images; expected {num_images}")
    for name, value in expected.items():
        if (found := entries[0].get(name)) != value:
            given = f"{path} was generated with another {name.replace('_', ' ')}, {shorten(found)}"
            raise ValueError(f"{given}; expected {shorten(value)}, or choose another folder")
