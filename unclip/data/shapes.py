"""Images of geometric shapes, with captions of the six kinds that GenEval tests (2310.11513).

python -m unclip.data.shapes data/shapes --count 20000

Twelve shapes in eleven colours, three sizes, solid or hollow, on white. The kinds of captions are
the axes of the evaluation: single ("a star"), two ("a star and a heart"), count ("three stars"),
colour ("a red star"), position ("a star above a heart") and attribution ("a red star and a blue
heart"). One combination in ten of shape and colour, and of relation and shapes, occurs only in the
held-out images. `unclip evaluate` scores each image against its caption: see evaluation/shapes.py.
"""

# S image side; coordinates are fractions of it

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from unclip.config import save_json
from unclip.data.compose import is_held_out, plural
from unclip.data.everyday import with_article
from unclip.data.shards import ShardWriter
from unclip.files import atomic_folder, check_new_folder, exit_on_error

COLOURS = {
    "red": (220, 40, 45),
    "orange": (245, 145, 30),
    "yellow": (250, 215, 40),
    "green": (50, 160, 70),
    "cyan": (60, 200, 215),
    "blue": (35, 90, 215),
    "purple": (130, 50, 180),
    "pink": (245, 130, 185),
    "brown": (125, 75, 40),
    "grey": (140, 140, 145),
    "black": (20, 20, 25),
}
SIZES = {"small": 0.24, "medium": 0.32, "large": 0.42}  # of one of several objects
ALONE = {"small": 0.3, "medium": 0.5, "large": 0.75}
COUNTS = ("one", "two", "three", "four", "five")
RELATIONS = {  # direction from the first object to the second
    "to the left of": (1, 0),
    "to the right of": (-1, 0),
    "above": (0, 1),
    "below": (0, -1),
}
AXES = ("single", "two", "count", "colour", "position", "attribution")
LIMITS = {"count": (1, 10**8), "size": (32, 2048), "seed": (0, 2**62)}  # of the arguments
HOLLOW = 0.55  # relative size of the hole
CAN_BE_HOLLOW = ("circle", "square", "diamond", "oval")  # a hole would cut the others in two
OVERSAMPLING = 4
GAP = 0.05  # smallest distance of objects
HELD_OUT_IMAGES = 0.05  # at most, of all images


def _polygon(corners: int, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [2 * math.pi * (k / corners + turn) - math.pi / 2 for k in range(corners)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def _star() -> list[tuple[float, float]]:
    outer, inner = _polygon(5), _polygon(5, 0.1)
    pairs = zip(outer, inner, strict=True)
    return [point for a, b in pairs for point in (a, (0.42 * b[0], 0.42 * b[1]))]


def _heart() -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * math.pi, 80, endpoint=False)
    x = 16 * np.sin(angles) ** 3
    y = -(
        13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
    )
    return list(zip((x / 17).tolist(), (y / 17).tolist(), strict=True))


def _crescent() -> list[tuple[float, float]]:
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(0.9, 2 * math.pi - 0.9, 60)]
    (x, y), n = outer[0], 60
    radius = 0.85
    centre = x + math.sqrt(radius**2 - y**2)
    start = math.atan2(y, x - centre)
    inner = np.linspace(2 * math.pi - start, start, n)
    return outer + [(centre + radius * math.cos(a), radius * math.sin(a)) for a in inner]


POLYGONS: dict[str, list[tuple[float, float]]] = {  # within the unit circle
    "circle": _polygon(96),
    "square": _polygon(4, 0.125),
    "triangle": _polygon(3),
    "diamond": [(0.62 * x, y) for x, y in _polygon(4)],
    "semicircle": [(math.cos(a), -math.sin(a)) for a in np.linspace(0, math.pi, 60)],
    "drop": [
        (0, -1.5),
        *((math.cos(a), math.sin(a)) for a in np.linspace(-0.75, math.pi + 0.75, 60)),
    ],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        *((-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33)),
        *((0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)),
    ],
    "crescent": _crescent(),
    "arrow": [(-1, -0.3), (0, -0.3), (0, -0.8), (1, 0), (0, 0.8), (0, 0.3), (-1, 0.3)],
    "oval": [(x, 0.6 * y) for x, y in _polygon(96)],
}
SHAPES = tuple(POLYGONS)


@dataclass(frozen=True)
class Shape:
    shape: str
    colour: str
    size: float  # of the longer side of its bounding box
    x: float  # of the centre of its bounding box
    y: float
    hollow: bool = False


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Return the polygon of a shape, centred, with a bounding box whose longer side is 1."""
    points = np.array(POLYGONS[shape])
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) / (high - low).max()
    return tuple((float(x), float(y)) for x, y in points)


def draw(shapes: Sequence[Shape], side: int) -> np.ndarray:
    """Draw shapes on white, antialiased: uint8 (S, S, 3)."""
    scale = side * OVERSAMPLING
    image = Image.new("RGB", (scale, scale), "white")
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        for size, fill in ((1, COLOURS[shape.colour]), (HOLLOW, (255, 255, 255))):
            if size == 1 or shape.hollow:
                factor = size * shape.size
                points = [
                    (scale * (shape.x + factor * x), scale * (shape.y + factor * y))
                    for x, y in outline(shape.shape)
                ]
                pen.polygon(points, fill=fill)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


# -- scenes


@dataclass(frozen=True)
class Scene:
    axis: str
    caption: str
    shapes: tuple[Shape, ...]
    colours_matter: bool  # whether the caption names them
    relation: str | None = None  # of the first shape to the second

    @property
    def held_out(self) -> bool:
        """Whether the scene has a combination that occurs only in the held-out images."""
        pairs = {(shape.colour, shape.shape) for shape in self.shapes}
        related = self.relation and (self.relation, *(shape.shape for shape in self.shapes))
        return any(is_held_out(*pair) for pair in pairs) or bool(related and is_held_out(*related))


def make_scene(axis: str, rng: np.random.Generator) -> Scene:
    """Draw a scene of one kind from the generator."""
    size = str(rng.choice(list(SIZES)))
    if axis in ("single", "colour"):
        (shape,) = _place_all([ALONE[size]], rng)
        named = axis == "colour"
        words = [size] if rng.random() < 0.3 else []
        words += ["hollow"] if shape.hollow and rng.random() < 0.7 else []
        words += [shape.colour] if named else []
        return Scene(axis, with_article(" ".join([*words, shape.shape])), (shape,), named)
    if axis == "count":
        number = int(rng.integers(2, len(COUNTS) + 1))
        first, *others = _place_all([SIZES["small" if number > 3 else "medium"]] * number, rng)
        look = {"shape": first.shape, "colour": first.colour, "hollow": first.hollow}
        shapes = (first, *(Shape(**{**asdict(other), **look}) for other in others))
        named = bool(rng.random() < 0.5)
        noun = f"{first.colour} {first.shape}" if named else first.shape
        return Scene(axis, f"{COUNTS[number - 1]} {plural(noun)}", shapes, named)
    relation = str(rng.choice(list(RELATIONS))) if axis == "position" else None
    while True:  # two different shapes; for attribution, also two colours
        first, second = _place_all([SIZES[size]] * 2, rng, RELATIONS.get(relation or ""))
        if first.shape != second.shape and first.colour != second.colour:
            break
    named = axis == "attribution"
    names = [with_article(f"{s.colour} {s.shape}" if named else s.shape) for s in (first, second)]
    return Scene(axis, f" {relation or 'and'} ".join(names), (first, second), named, relation)


def _place_all(
    sizes: Sequence[float], rng: np.random.Generator, direction: tuple[int, int] | None = None
) -> list[Shape]:
    """Return random shapes that do not touch; the second lies in `direction` from the first."""
    while True:
        places = [rng.uniform(s / 2 + 0.02, 1 - s / 2 - 0.02, 2) for s in sizes]
        apart = all(
            np.abs(places[i] - places[j]).max() > (sizes[i] + sizes[j]) / 2 + GAP
            for i in range(len(sizes))
            for j in range(i)
        )
        if direction is not None:
            offset = places[1] - places[0]
            along, across = offset @ np.array(direction), offset @ np.array(direction)[::-1]
            apart = apart and along > 2 * abs(across)
        if apart:
            break
    shapes = []
    for size, (x, y) in zip(sizes, places, strict=True):
        shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        hollow = shape in CAN_BE_HOLLOW and rng.random() < 0.25
        shapes.append(Shape(shape, colour, size, float(x), float(y), hollow))
    return shapes


def describe(scene: Scene) -> dict[str, Any]:
    """Return the metadata of a scene, from which an image can be scored."""
    return {
        "captions": [scene.caption],
        "annotation": scene.caption,
        "scene": {
            "axis": scene.axis,
            "colours_matter": scene.colours_matter,
            "relation": scene.relation,
            "shapes": [asdict(shape) for shape in scene.shapes],
        },
    }


def read_scene(meta: Mapping[str, Any], caption: str) -> Scene:
    """Invert `describe`; meta: its value "scene"."""
    shapes = tuple(Shape(**shape) for shape in meta["shapes"])
    return Scene(meta["axis"], caption, shapes, meta["colours_matter"], meta["relation"])


def write_shapes(
    out: str | Path, count: int, size: int = 64, seed: int = 0, axes: Sequence[str] = AXES
) -> dict[str, int]:
    """Write `count` training images and 1/20 as many held-out ones; return both numbers."""
    out, axes = Path(out), [axis for axis in AXES if axis in axes]
    check_new_folder(out)
    rng = np.random.default_rng(seed)
    wanted = {"train": count, "heldout": max(len(axes), round(count * HELD_OUT_IMAGES))}
    written = dict.fromkeys(wanted, 0)
    with (
        atomic_folder(out) as folder,
        ShardWriter(folder, "train") as train,
        ShardWriter(folder, "heldout") as held_out,
        tqdm(total=sum(wanted.values()), unit=" images") as bar,
    ):
        writers, turns = {"train": train, "heldout": held_out}, dict.fromkeys(wanted, 0)
        while written != wanted:
            split = next(name for name in wanted if written[name] < wanted[name])
            scene = make_scene(axes[turns[split] % len(axes)], rng)
            if scene.held_out != (split == "heldout"):
                continue
            png = io.BytesIO()
            Image.fromarray(draw(scene.shapes, size)).save(png, "PNG")
            name = f"{split}-{written[split]:07d}"
            writers[split].write(
                name, {"png": png.getvalue(), "txt": scene.caption, "json": describe(scene)}
            )
            written[split] += 1
            turns[split] += 1
            bar.update()
        summary = {"size": size, "seed": seed, "axes": axes, **written}
        save_json(summary, folder / "dataset.json")
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unclip.data.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", help="new folder for train-*.tar and heldout-*.tar")
    about = "training images (default: %(default)s)"
    parser.add_argument("--count", type=int, default=20_000, help=about)
    about = "image side in pixels (default: %(default)s)"
    parser.add_argument("--size", type=int, default=64, help=about)
    about = f"some of {', '.join(AXES)} (default: all)"
    parser.add_argument("--axes", nargs="+", default=AXES, choices=AXES, metavar="AXIS", help=about)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with exit_on_error("interrupted; nothing was written"):
        for name, (low, high) in LIMITS.items():
            if not low <= (value := getattr(options, name)) <= high:
                raise ValueError(f"--{name} is {value}; expected {low} to {high}")
        written = write_shapes(options.out, options.count, options.size, options.seed, options.axes)
    print(f"{options.out}: {written['train']} training images, {written['heldout']} held out")


if __name__ == "__main__":
    main()
