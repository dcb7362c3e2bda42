"""RandAugment on PIL images (Cubuk, Zoph, Shlens, Le 2020, "RandAugment", arXiv:1909.13719)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Color = tuple[int, int, int]
# An operation takes the image, a strength in -1..1 (its sign is the direction, where there is one) and a fill colour.
Operation = Callable[[Image.Image, float, Color], Image.Image]

MAX_MAGNITUDE = 30


def rand_augment(
    image: Image.Image, rng: np.random.Generator, num_operations: int, magnitude: float, *, fill: Color
) -> Image.Image:
    """Apply operations drawn uniformly from the paper's 14, each at the same magnitude out of 30.

    The direction of an operation that has one is random. Areas that open up at the border take the colour `fill`.
    Returns an RGB image of the same size.
    """
    for _ in range(num_operations):
        operation = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
        sign = 1.0 if rng.random() < 0.5 else -1.0
        image = operation(image, sign * magnitude / MAX_MAGNITUDE, fill)
    return image


def _affine(image: Image.Image, coefficients: tuple[float, ...], fill: Color) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BILINEAR, fillcolor=fill
    )


def _shear_x(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    slope = 0.3 * strength
    return _affine(image, (1, slope, -slope * image.height / 2, 0, 1, 0), fill)


def _shear_y(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    slope = 0.3 * strength
    return _affine(image, (1, 0, 0, slope, 1, -slope * image.width / 2), fill)


def _translate_x(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return _affine(image, (1, 0, 0.45 * strength * image.width, 0, 1, 0), fill)


def _translate_y(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, 0.45 * strength * image.height), fill)


def _rotate(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return image.rotate(30.0 * strength, resample=Image.Resampling.BILINEAR, fillcolor=fill)


def _identity(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return image


def _auto_contrast(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return ImageOps.equalize(image)


def _solarize(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return ImageOps.solarize(image, round(256 * (1.0 - abs(strength))))


def _posterize(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(4 * abs(strength)))


def _color(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return ImageEnhance.Color(image).enhance(1.0 + 0.9 * strength)


def _contrast(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(1.0 + 0.9 * strength)


def _brightness(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.0 + 0.9 * strength)


def _sharpness(image: Image.Image, strength: float, fill: Color) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(1.0 + 0.9 * strength)


OPERATIONS: tuple[Operation, ...] = (
    _identity,
    _auto_contrast,
    _equalize,
    _rotate,
    _solarize,
    _color,
    _posterize,
    _contrast,
    _brightness,
    _sharpness,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
