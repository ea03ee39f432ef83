"""Reading and writing image files, with the metadata that is needed to generate an image again."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import io
import json
import os
import re
import shutil
import struct
import subprocess
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import (
    Image,
    ImageDraw,
    ImageFont,
    ImageOps,
    PngImagePlugin,
    UnidentifiedImageError,
    features,
)

from unclip.extras import install
from unclip.files import open_regular, parse_json, printable

if TYPE_CHECKING:  # the command line reads metadata without importing torch
    from torch import Tensor

ImageSource = str | os.PathLike[str] | BinaryIO | Image.Image

# Formats that Pillow decodes by itself.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
if "avif" in features.modules and features.check_module("avif"):
    FORMATS = (*FORMATS, "AVIF")
MAX_DECODED = 2**29  # bytes of an image in memory: 134 million pixels of 8 bits per channel
WRITTEN = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}  # by `save_image`
METADATA_KEY = "unclip"  # of the PNG's iTXt chunk
XMP_KEY = "XML:com.adobe.xmp"
PNG_SIGNATURE, UP_FILTER = b"\x89PNG\r\n\x1a\n", 2
MIN_ISAL = 2**17  # bytes
EXIF_IFD, USER_COMMENT, ASCII_COMMENT = 0x8769, 0x9286, b"ASCII\0\0\0"
MAX_EXIF = 60_000  # bytes; a JPEG segment holds 65,533
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# IPTC's mark of generated images, which search engines and editors read.
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
_TEXTS = ("picture", "mask", "image_emb", "model", "prior_model", "dtype", "quantized")
FIELD_TYPES = {  # of an entry of the metadata and of the sources in it
    **dict.fromkeys(("options", "arguments", "inversion"), dict),
    **dict.fromkeys(_TEXTS, (str, type(None))),
    **dict.fromkeys(("sources", "lora"), list),
}
SEPARATORS = re.compile(r"[\s_.,;:!?'\"-]+")  # that a file name need not tell apart
MAX_FPS = {".gif": 100, ".mp4": 1000}
MIN_FPS = 0.1
MAX_METADATA = 60_000_000  # characters; Pillow refuses PNG files with more than 64 MB of text


def open_image(source: ImageSource) -> Image.Image:
    """Open an image as upright 8-bit RGB, composited on white; the first frame of an animation.

    Raises FileNotFoundError, or ValueError if the file is not an image of one of `FORMATS`, is
    damaged, or takes more than `MAX_DECODED` bytes in memory.
    """
    image = _open(source)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def open_mask(source: ImageSource) -> Image.Image:
    """Open an inpainting mask in mode L: 255 where the image is painted, 0 where it is kept.

    The painted area is the transparent part of the file; without one, its pixels above mid-grey.
    """
    image = _open(source)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        clear = image.getchannel("A").point([255] * 128 + [0] * 128)
        if clear.getbbox():
            return clear
    return image.convert("L").point([0] * 128 + [255] * 128)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` at the end, unless there is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _pillow_warnings_ignored() -> Iterator[None]:
    """Ignore what Pillow warns of: images that `MAX_DECODED` allows, damaged EXIF."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def identify(file: BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an encoded image; its pixels are decoded on `load()`, while `file` must stay open.

    All images are opened here, because Pillow starts other programs for some formats (EPS) whatever
    the file name. Raises ValueError if the image is too large, else the errors of Pillow.
    """
    with _pillow_warnings_ignored():
        image = Image.open(file, formats=formats)  # noqa: TID251
    width, height = image.size
    pixel = 8 if image.mode.startswith("I") else 4  # bytes; 16 bits are converted in 32
    if width * height * pixel > MAX_DECODED:
        expected = f"expected at most {MAX_DECODED // pixel:,} pixels in mode {image.mode}"
        raise ValueError(f"the image has {width} x {height} pixels; {expected}")
    return image


def _read(source: ImageSource) -> Image.Image:
    """Decode a file with all its metadata; errors name it."""
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, (str, os.PathLike, io.IOBase)):
        expected = "expected a path or a PIL image (for an array: Image.fromarray)"
        raise ValueError(f"cannot open an image from a {type(source).__name__}; {expected}")
    name = "the image" if isinstance(source, io.IOBase) else printable(source)
    try:
        if isinstance(source, io.IOBase):
            image = identify(source)  # type: ignore[arg-type]
            image.load()
            return image
        with open_regular(source) as file:
            image = identify(file)
            image.load()  # text may follow the pixels
            return image
    except FileNotFoundError:
        raise FileNotFoundError(f"image file {name} does not exist") from None
    except Exception as error:  # Pillow raises almost any type for damaged files
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> ValueError:
    known = isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError))
    unidentified = isinstance(error, UnidentifiedImageError)
    reason = printable(error) if known and not unidentified else "not a readable image"
    if reason.startswith(f"{name} is "):  # of `open_regular`, with what is expected
        return ValueError(reason)
    return ValueError(f"{name}: {reason}; expected an image ({', '.join(FORMATS)})")


def _open(source: ImageSource) -> Image.Image:
    """Open an image upright, with 8 bits per channel."""
    image = _read(source)
    name = "the image" if isinstance(source, (Image.Image, io.IOBase)) else printable(source)
    is_ours = not isinstance(source, Image.Image)
    try:
        with _pillow_warnings_ignored():
            image = ImageOps.exif_transpose(image, in_place=is_ours) or image
    except Exception as error:
        raise _unreadable(name, error) from None
    if image.mode in ("F", "LAB"):
        raise ValueError(f"{name}: mode is {image.mode}; expected RGB, grey, CMYK or a palette")
    if not image.mode.startswith("I"):
        return image
    # Pillow would clip 16 bits at 255.
    image = image.convert("I")
    low, high = np.asarray(image).min(), np.asarray(image).max()
    if low < 0 or high >= 2**16:
        raise ValueError(f"{name}: values are {low} to {high}; expected 0 to 65535 (16 bits)")
    return image.point([round(value / 257) for value in range(2**16)], "L")


def fit(image: Image.Image, size: int) -> Image.Image:
    """Crop the central square of an image and resize it to size x size, as for training."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image | np.ndarray] | np.ndarray) -> Tensor:
    """Convert B images of one size to (B, 3, H, W) in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def small_images(images: Sequence[Image.Image], size: int) -> Tensor:
    """Crop and reduce B images to means of 4 x 4 pixels: (B, 3, size, size) in [-1, 1]."""
    import torch.nn.functional as F

    return F.avg_pool2d(to_tensor([fit(image, 4 * size) for image in images]), 4)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert (B, 3, H, W) in [-1, 1] to B images; values outside are clipped."""
    pixels = images.float().mul(127.5).add(127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def resize(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize with antialiasing, without clamping: (B, C, H, W) -> (B, C, *size).

    mode is "bilinear" or "bicubic". Computed in float32 or wider and returned in the input's dtype.
    MPS tensors are resized on the CPU, because MPS lacks the gradient of this operation.
    """
    import torch

    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    wide = wide.cpu() if wide.device.type == "mps" else wide
    return torch.nn.functional.interpolate(wide, size, mode=mode, antialias=True).to(images)


def save_png(image: Image.Image, path: str | Path, metadata: Any = None) -> None:
    """Write a PNG atomically, with `metadata` (JSON types) as a text chunk; create parent folders.

    Raises OSError if the file cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    if text := _to_json(metadata, "png"):
        info.add_itxt(METADATA_KEY, text)
    with _replacing(Path(path)) as part:
        image.save(part, format="PNG", pnginfo=info)


def save_image(image: Image.Image, path: str | Path, metadata: Any = None) -> None:
    """Write a file of a kind in `WRITTEN` atomically, with metadata; create parent folders.

    Raises OSError if the file cannot be written.
    """
    path = Path(path)
    if (kind := WRITTEN[path.suffix.lower()]) == "png":
        return save_png(image, path, metadata)
    with _replacing(path) as part:
        part.write_bytes(encode_image(image, kind, metadata=metadata))


def image_name(text: str, seed: int) -> str:
    """Return a file name, without suffix, for an image of a text and a seed.

    If the name does not contain all of the text, a hash distinguishes it from similar texts.
    """
    name = slug(text)
    if name != SEPARATORS.sub("-", text.lower()).strip("-"):
        name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return f"{name}-{seed}"


def slug(text: str) -> str:
    """Return a file name of at most 60 characters, and 180 bytes: most file systems take 255."""
    name = re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:60]
    return name.encode()[:180].decode(errors="ignore").rstrip("-") or "image"


def figure(image: Image.Image, caption: str) -> str:
    """Return an HTML figure with the image in it."""
    data = base64.b64encode(encode_image(image)).decode()
    style = "display: inline-block; margin: 4px; text-align: center"
    text = html.escape(caption)
    return (
        f'<figure style="{style}"><img src="data:image/png;base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def encode_image(
    image: Image.Image, kind: str = "png", quality: int | None = None, metadata: Any = None
) -> bytes:
    """Encode a generated image as "png", "jpeg" or "webp", marked as generated in its XMP.

    quality: 0 to 100 of a JPEG or WebP. metadata: JSON types, for `read_metadata`; what the
    format has no room for is left out, with a warning.
    """
    file = io.BytesIO()
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(XMP_KEY, XMP)
        if text := _to_json(metadata, kind):
            info.add_itxt(METADATA_KEY, text)
        return _encode_png(image.convert("RGB"), info)
    exif = Image.Exif()
    if text := _to_json(metadata, kind):
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = ASCII_COMMENT + text.encode()
    quality = 90 if quality is None else max(quality, 1 if kind == "jpeg" else 0)
    image.save(file, kind, exif=exif.tobytes(), xmp=XMP.encode(), quality=quality)
    return file.getvalue()


def _encode_png(image: Image.Image, info: PngImagePlugin.PngInfo) -> bytes:
    """Encode an RGB image: about as small as with Pillow's level 1, in a fraction of the time.

    Each row is stored as its difference from the row above; Pillow tries five filters for each row.
    """
    pixels = np.asarray(image).reshape(image.height, -1)
    rows = np.empty((image.height, 1 + pixels.shape[1]), np.uint8)
    rows[:, 0] = UP_FILTER
    rows[:1, 1:] = pixels[:1]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    data = _deflate(rows.tobytes())
    header = struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    texts = [chunk[:2] for chunk in info.chunks]
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in [(b"IHDR", header), *texts, (b"IDAT", data), (b"IEND", b"")]
    )


def _deflate(data: bytes) -> bytes:
    """Compress fast to zlib format: with isal if installed, else only runs of equal bytes.

    Longer repetitions are rare in generated images. zlib is fast enough for small images, and makes
    them smaller.
    """
    if len(data) >= MIN_ISAL:
        with contextlib.suppress(ImportError):
            from isal import isal_zlib

            return isal_zlib.compress(data, 2)
    coder = zlib.compressobj(level=1, strategy=zlib.Z_RLE)
    return coder.compress(data) + coder.flush()


def read_source_type(path: str | Path) -> str | None:
    """Read the IPTC DigitalSourceType in the XMP of an image, such as "trainedAlgorithmicMedia"."""
    image = _read(path)
    xmp = image.info.get("xmp") or image.info.get(XMP_KEY) or b""
    text = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp)
    found = re.search(r"digitalsourcetype/(\w+)", text)
    return found and found[1]


def read_metadata(path: str | Path) -> list[dict[str, Any]]:
    """Read the metadata of an image that unclip wrote: one entry for each image in the file.

    Raises ValueError if the file is not an image, has no such metadata, or has damaged metadata.
    """
    image = _read(path)
    text = image.info.get(METADATA_KEY) if image.format == "PNG" else None
    if image.format == "GIF":
        comment = image.info.get("comment", b"")
        text = comment if comment.startswith((b"[", b'{"pictures":')) else None
    elif image.format in ("JPEG", "WEBP"):
        comment = _user_comment(image)
        text = comment.removeprefix(ASCII_COMMENT) if comment.startswith(ASCII_COMMENT) else None
    if text is None:
        raise ValueError(f"{path} has no unclip metadata; expected an image that unclip wrote")
    try:
        data = parse_json(text)
        if "pictures" in data:
            pictures = data["pictures"]
            data = _with_images(data["entries"], lambda i: None if i is None else pictures[i])
        entries = data if isinstance(data, list) else [data]
        if entries and all(_is_valid(source) for entry in entries for source in _sources(entry)):
            return entries
    except (ValueError, TypeError, LookupError, AttributeError):
        pass
    raise ValueError(f"{path}: damaged metadata; expected an image that unclip wrote")


def _user_comment(image: Image.Image) -> bytes:
    try:
        with _pillow_warnings_ignored():
            comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
    except Exception:  # Pillow raises almost any type for damaged EXIF
        return b""
    return comment if isinstance(comment, bytes) else b""


def _is_valid(source: dict[str, Any]) -> bool:
    """Return whether a metadata entry, or a source in one, has fields of the expected types."""
    if not isinstance(source, dict):
        return False
    return all(isinstance(source[n], FIELD_TYPES[n]) for n in FIELD_TYPES.keys() & source.keys())


def lacks_image(entry: dict[str, Any]) -> bool:
    """Return whether an input image is not stored in this metadata entry for lack of room."""
    return any(None in (part.get("picture", ""), part.get("mask", "")) for part in _sources(entry))


def _to_json(metadata: Any, kind: str) -> str | None:
    """Serialise metadata for a kind of file; several entries store each image once.

    Images are left out if the text would be too large for the file, and all if it still is, with a
    warning.
    """
    if metadata is None:
        return None
    data, entries = metadata, metadata if isinstance(metadata, list) else [metadata]
    if isinstance(metadata, list):
        index: dict[str, int] = {}
        numbered = _with_images(
            entries, lambda image: None if image is None else index.setdefault(image, len(index))
        )
        data = {"pictures": list(index), "entries": numbered} if index else numbered
    most = MAX_EXIF if kind in ("jpeg", "webp") else MAX_METADATA
    dump = json.JSONEncoder(ensure_ascii=kind != "png").encode
    if len(text := dump(data)) <= most:
        return text
    text = dump(_with_images(entries, lambda _: None))
    what = "input images are" if len(text) <= most else "metadata is"
    advice = "; a .png file has more room" if most == MAX_EXIF else ""
    warnings.warn(
        f"the {what} too large for a {kind} file, which cannot be generated again{advice}",
        stacklevel=3,
    )
    return text if len(text) <= most else None


def _sources(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of an entry that may hold images."""
    return [entry, *entry.get("sources", [])]


def _with_images(
    entries: Sequence[dict[str, Any]], change: Callable[[Any], Any]
) -> list[dict[str, Any]]:
    """Return copies of the entries with `change` applied to their images and masks."""

    def changed(source: dict[str, Any]) -> dict[str, Any]:
        images = {name: change(source[name]) for name in ("picture", "mask") if name in source}
        inner = {"sources": list(map(changed, source["sources"]))} if "sources" in source else {}
        return {**source, **images, **inner}

    return list(map(changed, entries))


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
    with _replacing(path) as part:
        if path.suffix.lower() == ".gif":
            _write_gif(images, part, fps, metadata)
        else:
            _write_mp4(images, part, fps)


def _write_gif(images: Sequence[Image.Image], path: Path, fps: float, metadata: Any) -> None:
    # All frames share one palette; with a palette each, static areas would flicker.
    sheet = grid(images, columns=len(images), gap=0)
    palette = sheet.quantize(256, dither=Image.Dither.NONE)
    frames = [x.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for x in images]
    comment = (_to_json(metadata, "gif") or "").encode()
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
        raise ValueError(f"{path.name} could not be written: ffmpeg reports {reason!r}")
