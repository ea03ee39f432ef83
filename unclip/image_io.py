"""Pictures in and out of files: opened strictly, written with what it takes to draw them again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import textwrap
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

METADATA_KEY = "unclip"  # of the PNG's iTXt chunk
TYPES = {  # of what an entry of the metadata may tell, or a source in it
    **dict.fromkeys(("options", "arguments", "inversion"), dict),
    **dict.fromkeys(
        ("picture", "mask", "image_emb", "model", "prior_model", "dtype", "quantized"),
        (str, type(None)),
    ),
    "sources": list,
}
FASTEST = {".gif": 100, ".mp4": 1000}  # pictures a second of animations
SLOWEST = 0.1
MOST_TEXT = 60_000_000  # characters of metadata; Pillow opens no PNG with texts beyond 64 MB


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """A picture as upright RGB of 8 bits, transparent parts on white; of an animation, its first frame.

    ValueError if the file is no picture, is truncated, or has more pixels than Pillow takes for honest (178 million).
    """
    image = _open(source)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def open_mask(source: str | Path | Image.Image) -> Image.Image:
    """What is to be painted, as 255 in a picture of mode L, and 0 where it is kept.

    That is the white of a mask (from middle grey on); or, if it has transparent parts, those.
    """
    image = _open(source)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        clear = image.getchannel("A").point([255] * 128 + [0] * 128)
        if clear.getbbox():
            return clear
    return image.convert("L").point([0] * 128 + [255] * 128)


def _open(source: str | Path | Image.Image) -> Image.Image:
    """Upright, with 8 bits a channel."""
    if not isinstance(source, (str, os.PathLike, Image.Image)) and not hasattr(source, "read"):
        kind = type(source).__name__
        raise ValueError(
            f"a {kind} is no picture; expected a path or a PIL picture (of an array: Image.fromarray)"
        )
    try:
        with (
            warnings.catch_warnings()
        ):  # a large picture is welcome; what is twice as large Pillow refuses itself
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(source)
            image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture at {source}") from None
    except Exception as error:  # damaged files make Pillow raise nearly anything
        told = (OSError, SyntaxError, Image.DecompressionBombError)
        known = isinstance(error, told) and not isinstance(error, UnidentifiedImageError)
        reason = error if known else "not a picture that can be read"
        raise ValueError(f"{source}: {reason}; expected a PNG, JPEG, WebP or the like") from None
    if image.mode in ("F", "LAB"):
        raise ValueError(
            f"{source}: its pixels are of kind {image.mode}; expected RGB, grey, CMYK or a palette"
        )
    if not image.mode.startswith("I"):
        return image
    grey = np.asarray(image, np.float64) / 257  # 16 bits, which Pillow would clip at 255
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


def save_png(image: Image.Image, path: str | Path, metadata: Any = None) -> None:
    """Writes a PNG whole or not at all; `metadata` (JSON types) goes into a text chunk. Parent folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_itxt(METADATA_KEY, _to_json(metadata))
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(part, format="PNG", pnginfo=info)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_metadata(path: str | Path) -> list[dict[str, Any]]:
    """What `save_png` or `save_animation` put into a PNG or GIF, one entry for each picture in it.

    ValueError if the file is no picture, or one that was not drawn here, or if its metadata is damaged.
    """
    open_image(path)
    with Image.open(path) as image:
        image.load()  # text chunks may follow the pixels
        text = getattr(image, "text", {}).get(METADATA_KEY)
        if image.format == "GIF" and image.info.get("comment", b"").startswith(
            (b"[", b'{"pictures":')
        ):
            text = image.info["comment"]
    if text is None:
        raise ValueError(
            f"{path} holds no metadata of unclip; it was drawn elsewhere, or its metadata was stripped"
        )
    try:
        told = json.loads(text)
        if "pictures" in told:
            pictures = told["pictures"]
            told = _with_pictures(
                told["entries"], lambda place: None if place is None else pictures[place]
            )
        entries = told if isinstance(told, list) else [told]
        sound = entries != [] and all(
            _is_sound(source) for entry in entries for source in _sources(entry)
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(
            f"{path}: its metadata is damaged, or not unclip's; expected a picture as unclip wrote it"
        )
    return entries


def _is_sound(source: dict[str, Any]) -> bool:
    """Whether it may be an entry of metadata, or a source in one."""
    right = (isinstance(source[name], types) for name, types in TYPES.items() if name in source)
    return isinstance(source, dict) and all(right)


def lacks_picture(entry: dict[str, Any]) -> bool:
    """Whether a picture that it was drawn from was too large for its metadata."""
    return any(
        None in (source.get("picture", ""), source.get("mask", "")) for source in _sources(entry)
    )


def _to_json(metadata: Any, ensure_ascii: bool = False) -> str:
    """For `read_metadata`: several entries hold each picture once. A warning if all pictures must be left out."""
    told = metadata
    if isinstance(metadata, list):
        places: dict[str, int] = {}
        entries = _with_pictures(
            metadata, lambda one: None if one is None else places.setdefault(one, len(places))
        )
        told = {"pictures": list(places), "entries": entries} if places else entries
    text = json.dumps(told, ensure_ascii=ensure_ascii)
    if len(text) <= MOST_TEXT:
        return text
    warnings.warn(
        "what was drawn from is too large for metadata: it cannot be drawn again from the file",
        stacklevel=3,
    )
    bare = _with_pictures(metadata if isinstance(metadata, list) else [metadata], lambda _: None)
    return json.dumps(bare, ensure_ascii=ensure_ascii)


def _sources(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Where an entry holds pictures."""
    return [entry, *entry.get("sources", [])]


def _with_pictures(
    entries: Sequence[dict[str, Any]], change: Callable[[Any], Any]
) -> list[dict[str, Any]]:
    """Entries with other values in place of the pictures."""

    def changed(source: dict[str, Any]) -> dict[str, Any]:
        inner = {"sources": list(map(changed, source["sources"]))} if "sources" in source else {}
        return {
            **source,
            **{name: change(source[name]) for name in ("picture", "mask") if name in source},
            **inner,
        }

    return list(map(changed, entries))


def grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Pictures of one size in rows of `columns`, on white with `gap` pixels between."""
    if not images:
        raise ValueError("a grid needs at least one picture")
    width, height = images[0].size
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def cell(
    pictures: Sequence[Image.Image | None], size: int, caption: str, titles: Sequence[str] = ()
) -> Image.Image:
    """Pictures side by side, `size` pixels each (None stays white), titles above, the caption below on two lines."""
    font = ImageFont.load_default(max(12, size // 10))
    line = round(font.size * 1.3)
    top, width = line if titles else 0, (size + 4) * len(pictures) - 4
    image = Image.new("RGB", (width, top + size + 2 * line + 4), "white")
    pen = ImageDraw.Draw(image)
    for i, picture in enumerate(pictures):
        left = i * (size + 4)
        if titles:
            pen.text((left + 2, 0), titles[i], fill="black", font=font)
        if picture is not None:
            image.paste(picture.resize((size, size), Image.Resampling.LANCZOS), (left, top))
    letters = max(8, int(width / font.getlength("n")))
    lines = textwrap.wrap(caption, letters, max_lines=2, placeholder=" …")
    pen.text((2, top + size + 2), "\n".join(lines), fill="black", font=font)
    return image


def check_animation(path: Path, fps: float) -> None:
    """ValueError unless `path` is a .gif, of 0.1 to 100 pictures a second, or an .mp4, to 1000, with an ffmpeg."""
    fastest = FASTEST.get(path.suffix.lower())
    if fastest is None:
        raise ValueError(f"{path}: an animation is written as .gif or .mp4")
    if not SLOWEST <= fps <= fastest:
        kind = path.suffix.lower()
        raise ValueError(
            f"fps is {fps:g}; expected {SLOWEST} to {fastest} pictures a second, the range of a {kind}"
        )
    if path.suffix.lower() == ".mp4":
        find_ffmpeg()


def save_animation(
    images: Sequence[Image.Image], path: str | Path, fps: float = 10.0, metadata: Any = None
) -> None:
    """Writes pictures of one size as a .gif or an .mp4, whole or not at all; a GIF repeats and holds the metadata.

    fps: pictures a second, see `check_animation`, whose errors are those of this.
    """
    path = Path(path)
    check_animation(path, fps)
    write = _write_gif if path.suffix.lower() == ".gif" else _write_mp4
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")  # ffmpeg tells the format by the ending
    try:
        write(images, part, fps, metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_gif(images: Sequence[Image.Image], path: Path, fps: float, metadata: Any) -> None:
    # One palette for all frames: with one of its own each, still parts would flicker.
    sheet = grid(images, columns=len(images), gap=0)
    palette = sheet.quantize(256, dither=Image.Dither.NONE)
    frames = [
        image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images
    ]
    comment = _to_json(metadata, ensure_ascii=True).encode() if metadata is not None else b""
    ends = [
        10 * round(100 * k / fps) for k in range(len(images) + 1)
    ]  # ms; a GIF counts in hundredths of a second
    lengths = [end - start for start, end in pairwise(ends)]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=lengths, loop=0, comment=comment
    )


def find_ffmpeg() -> str:
    """The program that writes an .mp4: that of imageio-ffmpeg, or else the system's; ValueError if there is neither."""
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        if (found := shutil.which("ffmpeg")) is None:
            raise ValueError(
                "an .mp4 needs ffmpeg (pip install imageio-ffmpeg brings one); or write a .gif"
            ) from None
        return found


def _write_mp4(images: Sequence[Image.Image], path: Path, fps: float, metadata: Any) -> None:
    width, height = images[0].size
    even = "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white"  # H.264 with colours at half resolution asks for it
    source = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{width}x{height}",
        "-r",
        str(fps),
        "-i",
        "-",
    ]
    target = ["-vf", even, "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
    command = [find_ffmpeg(), "-loglevel", "error", "-y", *source, *target]
    done = subprocess.run(
        command, input=b"".join(image.tobytes() for image in images), capture_output=True
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [
            f"exit status {done.returncode}"
        ]
        raise ValueError(f"{path.name} could not be written: ffmpeg says {lines[-1]}")
