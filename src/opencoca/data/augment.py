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
    operations = list(OPERATIONS.values())
    for _ in range(num_operations):
        operation = operations[int(rng.integers(len(operations)))]
        sign = 1.0 if rng.random() < 0.5 else -1.0
        image = operation(image, sign * magnitude / MAX_MAGNITUDE, fill)
    return image


def _affine(image: Image.Image, coefficients: tuple[float, ...], fill: Color) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BILINEAR, fillcolor=fill
    )


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, strength, fill: kind(image).enhance(1.0 + 0.9 * strength)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, strength, fill: image,
    "auto_contrast": lambda image, strength, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, fill: ImageOps.equalize(image),
    "rotate": lambda image, strength, fill: image.rotate(30.0 * strength, Image.Resampling.BILINEAR, fillcolor=fill),
    "solarize": lambda image, strength, fill: ImageOps.solarize(image, round(256 * (1.0 - abs(strength)))),
    "color": _enhanced(ImageEnhance.Color),
    "posterize": lambda image, strength, fill: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, s, fill: _affine(image, (1, 0.3 * s, -0.3 * s * image.height / 2, 0, 1, 0), fill),
    "shear_y": lambda image, s, fill: _affine(image, (1, 0, 0, 0.3 * s, 1, -0.3 * s * image.width / 2), fill),
    "translate_x": lambda image, s, fill: _affine(image, (1, 0, 0.45 * s * image.width, 0, 1, 0), fill),
    "translate_y": lambda image, s, fill: _affine(image, (1, 0, 0, 0, 1, 0.45 * s * image.height), fill),
}
