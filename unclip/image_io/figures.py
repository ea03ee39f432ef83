"""Several images in one file: sheets with captions, HTML figures, GIF and MP4 animations."""

from __future__ import annotations

import base64
import html
import os
import shutil
import subprocess
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from unclip.extras import install
from unclip.files import atomic_file
from unclip.image_io.metadata import dump_metadata
from unclip.image_io.writing import encode_image

MAX_FPS = {".gif": 100, ".mp4": 1000}
MIN_FPS = 0.1


def grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Arrange images of one size in rows of `columns`, on white with `gap` pixels between them."""
    if not images:
        raise ValueError("images is empty; a grid needs at least one image")
    width, height = images[0].size
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def cell(
    images: Sequence[Image.Image | None],
    size: int | tuple[int, int],
    caption: str,
    titles: Sequence[str] = (),
) -> Image.Image:
    """Arrange images in a row, `size` pixels each, with titles above and a two-line caption below.

    An image that is None leaves its place white.
    """
    width, height = (size, size) if isinstance(size, int) else size
    font = ImageFont.load_default(max(12, width // 10))
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow was built without FreeType otherwise
    line = round(font.size * 1.3)
    top, total = line if titles else 0, (width + 4) * len(images) - 4
    sheet = Image.new("RGB", (total, top + height + 2 * line + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left = i * (width + 4)
        if titles:
            pen.text((left + 2, 0), titles[i], fill="black", font=font)
        if image is not None:
            sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    letters = max(8, int(total / font.getlength("n")))
    lines = textwrap.wrap(caption, letters, max_lines=2, placeholder=" …")
    pen.text((2, top + height + 2), "\n".join(lines), fill="black", font=font)
    return sheet


def figure(image: Image.Image, caption: str) -> str:
    """Return an HTML figure with the image in it."""
    data = base64.b64encode(encode_image(image)).decode()
    style = "display: inline-block; margin: 4px; text-align: center"
    text = html.escape(caption)
    return (
        f'<figure style="{style}"><img src="data:image/png;base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def check_animation(path: Path, fps: float) -> None:
    """Raise ValueError if an animation cannot be written to `path` at this frame rate.

    A .gif allows 0.1 to 100 frames per second; an .mp4 allows up to 1000 and needs ffmpeg.
    """
    kind = path.suffix.lower()
    if kind not in MAX_FPS:
        raise ValueError(f"{path}: the file type is {kind!r}; expected .gif or .mp4")
    if not MIN_FPS <= fps <= MAX_FPS[kind]:
        raise ValueError(f"fps is {fps:g}; expected {MIN_FPS} to {MAX_FPS[kind]} for a {kind} file")
    if kind == ".mp4":
        find_ffmpeg()


def save_animation(
    images: Sequence[Image.Image], path: str | Path, fps: float = 10.0, metadata: Any = None
) -> None:
    """Write images of one size as a .gif (looping, with metadata) or .mp4, atomically.

    fps: frames per second. Raises the errors of `check_animation`.
    """
    path = Path(path)
    check_animation(path, fps)
    with atomic_file(path) as part:
        if path.suffix.lower() == ".gif":
            _write_gif(images, part, fps, metadata)
        else:
            _write_mp4(images, part, fps)


def _write_gif(images: Sequence[Image.Image], path: Path, fps: float, metadata: Any) -> None:
    # All frames share one palette; with a palette each, static areas would flicker.
    sheet = grid(images, columns=len(images), gap=0)
    palette = sheet.quantize(256, dither=Image.Dither.NONE)
    frames = [x.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for x in images]
    comment = (dump_metadata(metadata, "gif") or "").encode()
    # In ms; a GIF counts in hundredths of a second.
    ends = [10 * round(100 * k / fps) for k in range(len(images) + 1)]
    lengths = [end - start for start, end in pairwise(ends)]
    animation = {"save_all": True, "append_images": frames[1:], "duration": lengths, "loop": 0}
    frames[0].save(path, "GIF", comment=comment, **animation)


def find_ffmpeg() -> str:
    """Return the path of ffmpeg: imageio-ffmpeg's if installed, else the system's.

    Raises ValueError if there is neither.
    """
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        if (found := shutil.which("ffmpeg")) is None:
            advice = f"{install('video')}, or write a .gif"
            raise ValueError(f"writing an .mp4 needs ffmpeg, which is missing; {advice}") from None
        return found


def _write_mp4(images: Sequence[Image.Image], path: Path, fps: float) -> None:
    width, height = images[0].size
    # ffmpeg would read "tcp://host/a.mp4" or "concat:a.mp4" as a protocol; not an absolute path.
    # H.264 with subsampled colours needs an even width and height.
    even = "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white"
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -".split()
    target = f"-vf {even} -pix_fmt yuv420p -movflags +faststart -f mp4".split()
    done = subprocess.run(
        [find_ffmpeg(), "-loglevel", "error", "-y", *source, *target, os.path.abspath(path)],
        input=b"".join(image.tobytes() for image in images),
        capture_output=True,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        reason = reason.replace(os.path.abspath(path), "the file")  # a temporary one
        raise OSError(f"ffmpeg reports {reason!r}")
