"""Decoding: the bytes of a file become an upright 8-bit RGB image, or an `ImageError` says why they can't.

Files of cameras, scanners and web servers are accepted: EXIF rotation, grey, palettes, transparency, CMYK, 16 bits,
animations. Images that are too large are refused from the header, before any memory is taken for their pixels.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Largest image decoded unless told otherwise: the size from which Pillow itself assumes a decompression bomb."""

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif", ".jxl",
})
# fmt: on
"""Endings of files that a folder offers as images; some only so that they are reported instead of passed over."""

# EPS is a program for a PostScript interpreter, not a picture: opening one would start ghostscript.
_REFUSED_FORMATS = frozenset({"EPS"})

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112

ImageData = bytes | str | os.PathLike[str]
# (width, height), or a function that gives it for an upright image of this (width, height)
DraftSize = tuple[int, int] | Callable[[int, int], tuple[int, int]]


class ImageError(ValueError):
    """A file isn't a usable image. The message is one sentence that names the file; `reason` is its second half."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read the image {self.name!r}: {self.reason}"


@dataclass(frozen=True)
class ImageHeader:
    """The upright width and height of an image in pixels, and Pillow's names of its format and mode."""

    width: int
    height: int
    format: str
    mode: str


def read_header(data: ImageData, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> ImageHeader:
    """Read size, format and mode without decoding. Raises ImageError as `decode_image` does."""
    with _opened(data, max_pixels, name) as image:
        width, height = image.size
        if _is_sideways(image):
            width, height = height, width
        return ImageHeader(width, height, image.format or "", image.mode)


def decode_image(
    data: ImageData,
    *,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
    draft_size: DraftSize | None = None,
    as_stored: bool = False,
) -> Image.Image:
    """Decode a file (its bytes or its path) into an upright RGB image.

    Transparency is laid onto white, 16-bit grey scaled to 8 bits, and of an animation the first frame taken.

    Args:
        data: the encoded bytes, or the path of the file.
        max_pixels: larger images are refused from the header. Above Pillow's own limit (the default) Pillow refuses
            too, unless `PIL.Image.MAX_IMAGE_PIXELS` is raised.
        name: what error messages call the image; the path by default.
        draft_size: (width, height) that suffices, or a function that gives it once the size is known. A JPEG may then
            be decoded at 1/2, 1/4 or 1/8 of its size, never below this, which is several times as fast; other formats
            ignore it.
        as_stored: the pixels as the file has them instead: of any mode, and not turned upright.

    Raises:
        ImageError: truncated, not an image, a format that Pillow can't read, too large, empty.
    """
    with _opened(data, max_pixels, name) as image:
        sideways = draft_size is not None and _is_sideways(image)
        if callable(draft_size):
            draft_size = draft_size(*(image.size[::-1] if sideways else image.size))
        if draft_size is not None and image.format == "JPEG":
            image.draft("RGB", (draft_size[1], draft_size[0]) if sideways else draft_size)
        image.load()
        if as_stored:
            return image.copy()
        upright = to_rgb(image)
        # Asked for after load(): some of Pillow's formats (TIFF) turn the pixels themselves and then drop the tag.
        method = _TRANSPOSE.get(_orientation(image))
        return upright if method is None else upright.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to RGB; a new image even if it is RGB already.

    Grey of more than 8 bits is scaled by the range of its type (65,535 for 16 bits; for 32 bits 65,535 too unless
    values go beyond it), floating point by 1 if all values are within 0..1, else by 255.
    """
    mode = image.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        return _deep_grey_to_rgb(image)
    if mode in ("La", "RGBa"):
        image = image.convert("LA" if mode == "La" else "RGBA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    # A plain copy would keep the file's metadata, and with it an orientation that has been applied.
    rgb = image.convert("RGB") if mode != "RGB" else image.copy()
    rgb.info = {}
    return rgb


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        limit = 1.0 if low >= 0.0 and high <= 1.0 else 255.0
    else:
        limit = 65535.0 if high <= 65535.0 else 2.0**31 - 1
    grey = np.rint(np.clip(values / limit, 0.0, 1.0) * 255.0).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


@contextlib.contextmanager
def _opened(data: ImageData, max_pixels: int, name: str | None) -> Iterator[Image.Image]:
    """Pillow's lazily opened image; every way in which opening or using it can fail becomes an ImageError."""
    if name is None:
        name = "(bytes)" if isinstance(data, bytes) else os.fspath(data)
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_formats()) as image:
            width, height = image.size
            if width < 1 or height < 1:
                raise ImageError(name, f"its size is {width} x {height} pixels")
            if width * height > max_pixels:
                reason = f"its {width} x {height} pixels are more than the {max_pixels:,} allowed"
                raise ImageError(name, reason)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(name, _why_unidentified(data)) from None
    except Image.DecompressionBombError:
        reason = "its header announces more pixels than is safe to decode (a decompression bomb?)"
        raise ImageError(name, reason) from None
    except FileNotFoundError:
        raise ImageError(name, "there is no such file") from None
    except MemoryError:
        raise ImageError(name, "there is not enough memory to decode it") from None
    except Exception as error:  # Pillow's decoders fail on damaged data with every kind of exception
        text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        truncated = "truncated" in text.lower() or isinstance(error, EOFError)
        raise ImageError(name, f"it is damaged or cut short ({text})" if truncated else text) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Names of the formats to try: the most frequent ones first, as Pillow tries one after the other."""
    Image.init()
    accepted = [name for name in Image.ID if name not in _REFUSED_FORMATS]
    return tuple(sorted(accepted, key=lambda name: name not in ("JPEG", "PNG", "WEBP")))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to lose the picture
        return 1


def _is_sideways(image: Image.Image) -> bool:
    """Tells whether turning upright swaps width and height (for TIFF Pillow gives the upright size already)."""
    return image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)


def _why_unidentified(data: ImageData) -> str:
    with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
        head = file.read(512)
    if not head:
        return "the file is empty"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "Pillow does not support the format HEIC/HEIF; convert it to JPEG or PNG"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "this Pillow does not support the format AVIF; convert it to JPEG or PNG"
    if head.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        return "Pillow does not support the format JPEG XL; convert it to JPEG or PNG"
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is a web page (HTML), not an image"
    if start.startswith(b"<svg") or b"<svg" in start:
        return "Pillow does not support the format SVG; convert it to PNG"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "it is a text file, not an image"
    return "it is not an image in a format that Pillow supports"
