"""Converts images of every Pillow mode to RGB, large ones in strips, which takes less memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

# Larger images are converted in strips of about this number of pixels.
_STRIP_PIXELS = 1 << 22


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to RGB; a new image even if it is RGB already.

    Grey of more than 8 bits is scaled by the range of its type (65,535 for 16 bits; for 32 bits 65,535 too unless
    values go beyond it), floating point by 1 if all values are within 0..1, else by 255.
    """
    convert: Callable[[Image.Image], Image.Image] = _to_rgb
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        convert = functools.partial(_deep_grey_to_rgb, limit=_range_of(image))
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // max(1, width))
    if rows >= height:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for strip in _strips(width, height, rows):
        rgb.paste(convert(image.crop(strip)), strip)
    return rgb


def _strips(width: int, height: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
    return ((0, top, width, min(height, top + rows)) for top in range(0, height, rows))


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
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


def _range_of(image: Image.Image) -> float:
    """The value that stands for white in an image of deep grey."""
    if image.mode.startswith("I;16"):
        return 65535.0
    width, height = image.size
    strips = (np.asarray(image.crop(strip)) for strip in _strips(width, height, max(1, _STRIP_PIXELS // width)))
    ends = [(float(np.min(found)), float(np.max(found))) for found in map(_finite, strips)]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    if image.mode == "F":
        return 1.0 if low >= 0.0 and high <= 1.0 else 255.0
    return 65535.0 if high <= 65535.0 else 2.0**31 - 1


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _grey(values: np.ndarray, limit: float) -> np.ndarray:
    return np.rint(np.clip(values.astype(np.float64) / limit, 0.0, 1.0) * 255.0).astype(np.uint8)


def _deep_grey_to_rgb(image: Image.Image, limit: float) -> Image.Image:
    values = np.asarray(image)
    of_16_bits = image.mode.startswith("I;16")
    grey = _grey(np.arange(65536), limit)[values] if of_16_bits else _grey(_finite(values), limit)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
