"""Turns a PIL image into the array that a model takes: exact for evaluation, random but seeded for training.

Letters in shapes: H height, W width, in pixels.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageEnhance

from opencoca.data.augment import MAX_MAGNITUDE, rand_augment
from opencoca.data.images import ImageData, decode_image
from opencoca.tokenizer.languages import language_of

ResizeMode = Literal["squash", "crop", "pad"]
Decoding = Literal["upright", "as_stored"]
Box = tuple[float, float, float, float]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_MAX_COVER_RATIO = 256
# Far beyond all models and their images.
_MAX_SIDE, _MAX_MEAN, _MAX_STD = 8192, 1000, 1000


@dataclass(frozen=True)
class PreprocessConfig:
    """The preprocessing of images; stored with the model, since its weights depend on it.

    Args:
        image_size: (height, width) in pixels.
        mean, std: of the RGB channels, for values in 0..1.
        resize_mode: `crop` fits the shorter side and cuts the centre out, `pad` fits the longer side and fills up with
            the mean colour, `squash` fits both sides and ignores the aspect ratio.
        decoding: `upright` applies EXIF rotation, lays transparency onto white and scales 16 bits to 8 before resizing;
            `as_stored` resizes the pixels as the file has them and converts to RGB afterwards, as open_clip's
            evaluation does (docs/equality.md). Ordinary photographs come out the same.
    """

    image_size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize_mode: ResizeMode = "crop"
    decoding: Decoding = "upright"

    def __post_init__(self) -> None:
        for name, length in (("image_size", 2), ("mean", 3), ("std", 3)):
            values = tuple(getattr(self, name))
            if len(values) != length:
                raise ValueError(f"{name} must have {length} values, got {values}")
            object.__setattr__(self, name, values)  # lists out of JSON or YAML
        if not all(type(side) is int and 1 <= side <= _MAX_SIDE for side in self.image_size):
            raise ValueError(f"image_size must be two whole numbers from 1 to {_MAX_SIDE}, got {self.image_size}")
        # Comparisons that NaN fails too.
        if not all(isinstance(value, int | float) and -_MAX_MEAN <= value <= _MAX_MEAN for value in self.mean):
            raise ValueError(f"mean must be numbers, of values in 0..1, got {self.mean}")
        if not all(isinstance(value, int | float) and 1 / _MAX_STD <= value <= _MAX_STD for value in self.std):
            raise ValueError(f"std must be positive numbers, of values in 0..1, got {self.std}")
        if self.resize_mode not in get_args(ResizeMode):
            raise ValueError(f"resize_mode must be one of {get_args(ResizeMode)}, got {self.resize_mode!r}")
        if self.decoding not in get_args(Decoding):
            raise ValueError(f"decoding must be one of {get_args(Decoding)}, got {self.decoding!r}")

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreprocessConfig:
        """The inverse of `to_dict`. Raises ValueError for unknown names and unusable values."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"the preprocessing has unknown settings: {', '.join(unknown)}")
        return cls(**values)

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour in 0..255: zero once normalised."""
        red, green, blue = (min(255, max(0, round(255 * value))) for value in self.mean)
        return red, green, blue


def normalize(pixels: np.ndarray, config: PreprocessConfig) -> torch.Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32, (value / 255 - mean) / std per channel."""
    mean = torch.tensor(config.mean, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(config.std, dtype=torch.float32).view(3, 1, 1)
    planes = torch.from_numpy(pixels).movedim(-1, -3)
    # NumPy asks for large pages, PyTorch does not: memory that is new for every batch costs more than the arithmetic.
    values = torch.from_numpy(np.empty(planes.shape, np.float32))
    images = (math.prod(planes.shape[:-3]), *planes.shape[-3:])
    # Image by image, so that each step finds the one's before in the processor's cache.
    for image, source in zip(values.view(images), planes.reshape(images), strict=True):
        image.copy_(source.contiguous()).div_(255.0).sub_(mean).div_(std)
    return values


class EvalTransform:
    """The one deterministic way into a model: bicubic with antialiasing as Pillow does it, then normalisation.

    `transform(image)` maps a PIL image to (3, H, W) float32, `transform.to_uint8(image)` to (H, W, 3) uint8. An image
    that is not RGB is resized as it is and converted afterwards.
    """

    def __init__(self, config: PreprocessConfig):
        self.config = config

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return normalize(self.to_uint8(image), self.config)

    def to_uint8(self, image: Image.Image) -> np.ndarray:
        height, width = self.config.image_size
        mode = self.config.resize_mode
        if mode == "pad":
            result = _letterbox(image, (width, height), self.config.fill)
        elif mode == "crop":
            result = _cover(image, (width, height))
        else:
            result = _resize(image, (width, height), (0, 0, *image.size))
        return np.array(result.convert("RGB"))


def _cover(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Resize until the image just covers the target, then cut the centre out.

    Both sizes and the crop's corner are whole pixels, rounded as torchvision's Resize and CenterCrop do, so that models
    evaluated with these see the same pixels here.
    """
    scale = max(target[0] / image.width, target[1] / image.height)
    # The tiny summand undoes the rounding error of a side that should come out whole.
    width, height = max(target[0], int(image.width * scale + 1e-6)), max(target[1], int(image.height * scale + 1e-6))
    left, top = round((width - target[0]) / 2), round((height - target[1]) / 2)
    if width * height <= _MAX_COVER_RATIO * target[0] * target[1]:
        whole = image.resize((width, height), Image.Resampling.BICUBIC)
        return whole.crop((left, top, left + target[0], top + target[1]))
    # Of a strip of 1 x 10,000 pixels the resized whole would be huge. Resizing only the part that is kept equals the
    # above up to the rounding between Pillow's two passes, whose order depends on the sizes.
    across, down = image.width / width, image.height / height
    return _resize(image, target, (left * across, top * down, (left + target[0]) * across, (top + target[1]) * down))


def _letterbox(image: Image.Image, target: tuple[int, int], fill: tuple[int, int, int]) -> Image.Image:
    scale = min(target[0] / image.width, target[1] / image.height)
    width = min(target[0], max(1, round(image.width * scale)))
    height = min(target[1], max(1, round(image.height * scale)))
    result = Image.new("RGB", target, fill)
    inner = _resize(image, (width, height), (0, 0, *image.size))
    result.paste(inner.convert("RGB"), ((target[0] - width) // 2, (target[1] - height) // 2))
    return result


def _resize(image: Image.Image, target: tuple[int, int], box: Box) -> Image.Image:
    """Bicubic, antialiased resize of a part of the image; rounding that puts the box outside is undone."""
    left, top, right, bottom = box
    inside = max(0.0, left), max(0.0, top), min(float(image.width), right), min(float(image.height), bottom)
    return image.resize(target, Image.Resampling.BICUBIC, box=inside)


class TrainTransform:
    """Random resized crop, mirroring, colour jitter and RandAugment: a pure function of the image and the generator.

    Args:
        config: size and normalisation; its resize_mode is not used.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's aspect ratio relative to the target's, drawn log-uniformly.
        flip_probability: of mirroring; see `mentions_side`.
        color_jitter: brightness, contrast and saturation are scaled by factors in 1 ± this.
        rand_augment: (operations per image, magnitude out of 30), or None for no RandAugment.
    """

    def __init__(
        self,
        config: PreprocessConfig,
        *,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        color_jitter: float = 0.0,
        rand_augment: tuple[int, float] | None = None,
    ):
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be a range within 0..1, got {scale}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be a range of positive numbers, got {ratio}")
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"flip_probability must be in 0..1, got {flip_probability}")
        if not 0 <= color_jitter <= 1:
            raise ValueError(f"color_jitter must be in 0..1, got {color_jitter}")
        if rand_augment is not None and not (rand_augment[0] >= 1 and 0 <= rand_augment[1] <= MAX_MAGNITUDE):
            raise ValueError(
                f"rand_augment must be (1 or more operations, magnitude in 0..{MAX_MAGNITUDE}), got {rand_augment}"
            )
        self.config = config
        self.scale = scale
        self.ratio = ratio
        self.flip_probability = flip_probability
        self.color_jitter = color_jitter
        self.rand_augment = rand_augment

    def __call__(self, image: Image.Image, rng: np.random.Generator, *, flip: bool | None = None) -> torch.Tensor:
        """(3, H, W) float32. `flip` decides about mirroring; None lets the generator decide."""
        return normalize(self._finish(image, self._draw_box(image.size, rng), rng, flip), self.config)

    def decode_uint8(
        self, data: ImageData, rng: np.random.Generator, *, flip: bool | None = None, name: str | None = None
    ) -> np.ndarray:
        """Decode and transform in one go, without the normalisation: (H, W, 3) uint8.

        The crop is drawn from the header, so that a large JPEG is only decoded as finely as its crop needs (Pillow's
        `draft`). The crop, mirroring and colours are those of a call with the decoded image; the pixels differ by
        the coarser decoding. Raises ImageError as `decode_image` does.
        """
        size, box = (0, 0), (0.0, 0.0, 0.0, 0.0)

        def draw(full_width: int, full_height: int) -> tuple[int, int]:
            """Draws the crop, and says what size of the whole image it needs."""
            nonlocal size, box
            size, box = (full_width, full_height), self._draw_box((full_width, full_height), rng)
            height, width = self.config.image_size
            shrink = max(width / (box[2] - box[0]), height / (box[3] - box[1]))
            return math.ceil(full_width * shrink), math.ceil(full_height * shrink)

        image = decode_image(data, name=name, draft_size=draw)
        left, top, right, bottom = box
        across, down = image.width / size[0], image.height / size[1]
        box = left * across, top * down, right * across, bottom * down
        return self._finish(image, box, rng, flip)

    def _finish(self, image: Image.Image, box: Box, rng: np.random.Generator, flip: bool | None) -> np.ndarray:
        height, width = self.config.image_size
        result = _resize(image, (width, height), box)
        # Drawn even if it isn't needed: what comes after must not depend on who decides about mirroring.
        drawn = rng.random() < self.flip_probability
        if drawn if flip is None else flip:
            result = result.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color_jitter > 0:
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                result = enhance(result).enhance(1.0 + self.color_jitter * rng.uniform(-1.0, 1.0))
        if self.rand_augment is not None:
            result = rand_augment(result, rng, *self.rand_augment, fill=self.config.fill)
        return np.array(result)

    def _draw_box(self, size: tuple[int, int], rng: np.random.Generator) -> Box:
        """A random box within the image, in whole pixels; the largest box of a fitting shape if none is found."""
        width, height = size
        target = self.config.image_size[1] / self.config.image_size[0]
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            aspect = target * math.exp(rng.uniform(low, high))
            across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < across <= width and 0 < down <= height:
                left = int(rng.integers(0, width - across + 1))
                top = int(rng.integers(0, height - down + 1))
                return left, top, left + across, top + down
        aspect = min(max(width / height, target * self.ratio[0]), target * self.ratio[1])
        across = min(width, max(1, round(height * aspect)))
        down = min(height, max(1, round(width / aspect)))
        left, top = (width - across) // 2, (height - down) // 2
        return left, top, left + across, top + down


_SIDE = re.compile(r"\b(?:left|right)(?:s|most|wards?|sides?|hand|handed)?\b", re.IGNORECASE)
# The same in other languages, by what the words begin with, or contain.
_SIDES = {
    language: re.compile(words, re.IGNORECASE)
    for language, words in {
        "ar": "يسار|يمين|يسرى|يمنى|أيسر|أيمن|الايسر|الايمن",
        "cs": r"\b(?:do|na|v|z)?(?:lev|prav)",
        "de": r"\b(?:link|recht)",
        "es": r"\b(?:izquierd|derech)",
        "fr": r"\b(?:gauche|droit)",
        "hi": "बाएं|बाएँ|बाईं|बायां|बायाँ|बायीं|बायें|दाएं|दाएँ|दाईं|दायां|दायाँ|दाहिन|दायीं|दायें",
        "it": r"\b(?:sinistr|destr)",
        "ja": "[左右]",
        "pt": r"\b(?:esquerd|direit)",
        "zh": "[左右]",
    }.items()
}


def mentions_side(caption: str) -> bool:
    """Tells whether a caption speaks of left or right, so that it would be wrong for the mirrored image.

    In English, unless the caption knows another of the languages ar, cs, de, es, fr, hi, it, ja, pt and zh.
    """
    return _SIDES.get(language_of(caption) or "", _SIDE).search(caption) is not None
