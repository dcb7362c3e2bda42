"""Decoding: the bytes of a file become an upright 8-bit RGB image, or an `ImageError` says why they can't.

Files of cameras, scanners and web servers are accepted: EXIF rotation, grey, palettes, transparency, CMYK, 16 bits,
animations. Images that are too large are refused from the header, before any memory is taken for their pixels; no image
takes more than 1.2 GB unless `allow_pixels` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from opencoca.data.image_bytes import clean_bytes
from opencoca.data.rgb import to_rgb
from opencoca.system.messages import shown
from opencoca.system.reading import read_ordinary

MAX_PIXELS = 178_956_970
"""Largest image decoded unless told otherwise: the size from which Pillow itself assumes a decompression bomb."""
MAX_FILE_BYTES = 1 << 30
"""Larger files are not read."""

# What decoding an image of MAX_PIXELS may take; in proportion where more pixels are allowed.
_MAX_MEMORY_BYTES = 1.2e9
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # a pixel in memory; else 4
# What decoders hold for each pixel besides the image.
_DECODER_BYTES = {"WEBP": 12, "AVIF": 12, "JPEG2000": 12, "HEIF": 8}

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


_allowed_pixels = MAX_PIXELS


def allow_pixels(count: int) -> None:
    """Lets images of up to this number of pixels be decoded in this process, and in those it starts by fork."""
    global _allowed_pixels
    _allowed_pixels = count
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, (count + 1) // 2)  # Pillow refuses twice as many


class ImageError(ValueError):
    """A file isn't a usable image. The message is one sentence that names the file; `reason` is its second half."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read the image {shown(self.name, _MAX_NAME)}: {self.reason}"


@dataclass(frozen=True)
class ImageHeader:
    """The upright width and height of an image in pixels, and Pillow's names of its format and mode."""

    width: int
    height: int
    format: str
    mode: str


def read_image_file(path: str | os.PathLike[str], name: str | None = None) -> bytes:
    """Reads an image file as it is. Raises ImageError if it cannot be read, is too large or not an ordinary file."""
    name = os.fspath(path) if name is None else name
    try:
        return read_ordinary(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise ImageError(name, "there is no such file") from None
    except OSError as error:
        raise ImageError(name, error.strerror or str(error)) from error
    except ValueError as error:  # a NUL in the path
        raise ImageError(name, str(error)) from None


def read_header(data: ImageData, *, max_pixels: int | None = None, name: str | None = None) -> ImageHeader:
    """Read size, format and mode without decoding. Raises ImageError as `decode_image` does."""
    with _opened(data, max_pixels, name) as image:
        width, height = image.size
        if _is_sideways(image):
            width, height = height, width
        return ImageHeader(width, height, image.format or "", image.mode)


def decode_image(
    data: ImageData,
    *,
    max_pixels: int | None = None,
    name: str | None = None,
    draft_size: DraftSize | None = None,
    as_stored: bool = False,
) -> Image.Image:
    """Decode an image into an upright RGB image.

    Transparency is laid onto white, 16-bit grey scaled to 8 bits, and of an animation the first frame taken.

    Args:
        data: the encoded bytes, or the path of the file.
        max_pixels: larger images are refused from the header, and so are fewer pixels whose conversion would take more
            memory than this number of RGB pixels allows (1.2 GB at MAX_PIXELS). None for MAX_PIXELS, or what
            `allow_pixels` says. Above Pillow's own limit Pillow refuses too, unless `PIL.Image.MAX_IMAGE_PIXELS` is
            raised.
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
        _scale_transparent_colour(image)
        _check_memory(image, max_pixels, as_stored)
        image.load()
        # Asked for after load(): some of Pillow's formats (TIFF) turn the pixels themselves and then drop the tag.
        method = None if as_stored else _TRANSPOSE.get(_orientation(image))
        found = image.transpose(method) if method is not None else image._new(image.im)  # the same pixels, not a copy
        if as_stored:
            return found
        if found.mode == "RGB" and not found.has_transparency_data:
            found.info = {}
            return found
        return to_rgb(found)


def _scale_transparent_colour(image: Image.Image) -> None:
    """Brings the transparent colour of a PNG of 2, 4 or 3 x 16 bits to the 8 bits that its pixels are decoded to."""
    rawmode = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else None
    colour = image.info.get("transparency")
    if rawmode == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif rawmode in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * (85 if rawmode == "L;2" else 17)


def _check_memory(image: Image.Image, max_pixels: int | None, as_stored: bool) -> None:
    """Raises ImageError if decoding this image, turning it upright and converting it would take too much memory."""
    allowed = _MAX_MEMORY_BYTES * max(1.0, (max_pixels or _allowed_pixels) / MAX_PIXELS)
    pixel_bytes = _MODE_BYTES.get(image.mode, 4)
    # Where a PNG's header does not say which side is up, Pillow would decode it to look behind the pixels.
    known = image.format != "PNG" or "exif" in image.info
    copies = 2 if known and not as_stored and _orientation(image) in _TRANSPOSE else 1
    result = 0 if as_stored or image.mode == "RGB" else 4
    needed = (pixel_bytes * copies + result + _DECODER_BYTES.get(image.format or "", 0)) * image.width * image.height
    if needed > allowed:
        reason = (
            f"to decode its {image.width} x {image.height} pixels ({image.format}, {image.mode}) would take "
            f"{needed / 1e9:.1f} GB, more than the {allowed / 1e9:.1f} allowed; {_REMEDY}"
        )
        raise ImageError("", reason)


@contextlib.contextmanager
def _opened(data: ImageData, max_pixels: int | None, name: str | None) -> Iterator[Image.Image]:
    """Pillow's lazily opened image; every way in which opening or using it can fail becomes an ImageError."""
    if name is None:
        name = "(bytes)" if isinstance(data, bytes) else os.fspath(data)
    if not isinstance(data, bytes):
        data = read_image_file(data, name)
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(clean_bytes(data)), formats=_formats()) as image:
            width, height = image.size
            if width < 1 or height < 1:
                raise ImageError(name, f"its size is {width} x {height} pixels")
            allowed = max_pixels or _allowed_pixels
            if width * height > allowed:
                raise ImageError(
                    name, f"its {width} x {height} pixels are more than the {allowed:,} allowed; {_REMEDY}"
                )
            yield image
    except ImageError as error:
        raise ImageError(name, error.reason) from None
    except UnidentifiedImageError:
        raise ImageError(name, _why_unidentified(data)) from None
    except Image.DecompressionBombError:
        reason = f"its header announces more pixels than is safe to decode (a decompression bomb?); {_REMEDY}"
        raise ImageError(name, reason) from None
    except MemoryError:
        raise ImageError(name, "there is not enough memory to decode it") from None
    except Exception as error:  # Pillow's decoders fail on damaged data with every kind of exception
        text = " ".join(str(getattr(error, "strerror", None) or error).split())[:_MAX_REASON] or type(error).__name__
        truncated = "truncated" in text.lower() or isinstance(error, EOFError)
        raise ImageError(name, f"it is damaged or cut short ({text})" if truncated else text) from error


_REMEDY = "make it smaller, or allow more (--max-pixels, in recipes data.max_pixels, in Python allow_pixels)"
_MAX_NAME, _MAX_REASON = 140, 120  # characters shown
_silent_filter: Any = None


def _silence_pillow() -> None:
    """Passes over Pillow's warnings: what they speak of is no reason to lose the picture, or becomes an error."""
    global _silent_filter
    if _silent_filter is None or _silent_filter not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        _silent_filter = warnings.filters[0]


@functools.cache
def _formats() -> tuple[str, ...]:
    """Names of the formats to try: the most frequent ones first, as Pillow tries one after the other."""
    Image.init()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints what its plugins log as errors
    _silence_libtiff()
    with contextlib.suppress(ImportError):  # an extra of the package
        import pi_heif

        pi_heif.register_heif_opener()
    accepted = [name for name in Image.ID if name not in _REFUSED_FORMATS]
    return tuple(sorted(accepted, key=lambda name: name not in ("JPEG", "PNG", "WEBP")))


def _silence_libtiff() -> None:
    """Makes Pillow's libtiff print nothing, where it can be found: what it would say is an error, or harmless."""
    with contextlib.suppress(OSError, AttributeError), open("/proc/self/maps", encoding="utf-8") as maps:
        for path in {line.split(maxsplit=5)[-1].strip() for line in maps if "/libtiff" in line}:
            library = ctypes.CDLL(path)
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to lose the picture
        return 1


def _is_sideways(image: Image.Image) -> bool:
    """Tells whether turning upright swaps width and height (for TIFF Pillow gives the upright size already)."""
    return image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)


def _why_unidentified(data: bytes) -> str:
    head = data[:512]
    if not head:
        return "the file is empty"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        if "HEIF" in _formats():
            return "it is a HEIC file, but damaged"
        return "reading HEIC needs a package that is not installed; install the extra: pip install 'opencoca[heif]'"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "this Pillow does not support the format AVIF; install a newer one: pip install --upgrade pillow"
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
