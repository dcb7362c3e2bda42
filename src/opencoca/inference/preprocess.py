"""Turns images of any kind (paths, bytes, PIL images, arrays, tensors) into a model's input.

Letters: I images, H height, W width, in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from opencoca.data.images import MAX_FILE_BYTES, ImageError, decode_image
from opencoca.data.read_ahead import batches_ahead
from opencoca.data.rgb import to_rgb
from opencoca.data.transforms import EvalTransform, PreprocessConfig

ImageLike = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray | Tensor
"""One image: the path of a file, its bytes, an open file, a PIL image, an array (H, W, 3) or (H, W), or a tensor
(3, H, W).

Arrays and tensors hold uint8 in 0..255 or floating point in 0..1.
"""

Images = ImageLike | Iterable[ImageLike]
"""One image or several."""

_DECODING_THREADS = 2


class Preprocess:
    """Makes images a batch for the model: `preprocess(images)` is (I, 3, H, W) float32; `config` says how."""

    def __init__(self, config: PreprocessConfig):
        self.config = config
        self._transform = EvalTransform(config)

    def __call__(self, images: Images) -> Tensor:
        """Prepares one image or several, of any size, as (I, 3, H, W) float32.

        Raises ImageError, which names the image, for one that cannot be used.
        """
        images = as_list(images)
        if not images:
            return torch.empty(0, 3, *self.config.image_size)
        return torch.stack([self._prepare(image, position) for position, image in enumerate(images)])

    def batches(self, images: Images, batch_size: int) -> Iterator[Tensor]:
        """Prepares images batch_size at a time; while one batch is in use, threads decode the next.

        Raises ValueError if batch_size is not positive, ImageError as a call does.
        """
        check_batch_size(batch_size)
        images = as_list(images)

        def prepare(position: int) -> Tensor:
            return self._prepare(images[position], position)

        for rows in batches_ahead(prepare, range(len(images)), batch_size, _DECODING_THREADS):
            yield torch.stack(rows)

    def _prepare(self, image: ImageLike, position: int) -> Tensor:
        return self._transform(as_pil(image, position, as_stored=self.config.decoding == "as_stored"))


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError for a batch_size that is not positive."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")


def as_list(images: Images) -> list[ImageLike]:
    """Makes a list of one image or several; an array or tensor of four dimensions is a batch of images."""
    single = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
    if single or hasattr(images, "read"):  # an open file would be a list of its lines
        return [images]  # pyright: ignore[reportReturnType]
    if isinstance(images, np.ndarray | Tensor) and images.ndim != 4:
        return [images]
    if not isinstance(images, Iterable):
        raise ValueError(f"{images!r} is no image and no list of images; {_ACCEPTED}")
    return list(images)


def as_pil(image: ImageLike, position: int = 0, *, as_stored: bool = False) -> Image.Image:
    """Makes an upright RGB PIL image of an image of any accepted kind.

    position: its number in its list, for messages about images without a name.
    as_stored: whether the image keeps its mode and is not turned upright (see `decode_image`).

    Raises ImageError if it cannot be used.
    """
    if isinstance(image, str | os.PathLike):
        return decode_image(Path(image), as_stored=as_stored)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_image(bytes(image), name=f"number {position} (bytes)", as_stored=as_stored)
    if isinstance(image, Image.Image):
        return _from_pil(image, position, as_stored)
    if hasattr(image, "read") and not isinstance(image, Tensor | np.ndarray):
        name = getattr(image, "name", None)
        return _from_file(image, name if isinstance(name, str) else f"number {position} (file)", as_stored)
    if isinstance(image, Tensor):
        name = f"number {position} (tensor of shape {tuple(image.shape)})"
        if image.ndim != 3 or image.shape[0] != 3:
            raise ImageError(name, "a tensor must have the shape (3, height, width)")
        values = image.detach().cpu().movedim(0, -1)
        if values.is_floating_point():
            values = values.float()  # NumPy has no bfloat16
        return _from_array(values.numpy(), name)
    if isinstance(image, np.ndarray):
        name = f"number {position} (array of shape {image.shape})"
        if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise ImageError(name, "an array must have the shape (height, width, 3) or (height, width)")
        return _from_array(image, name)
    raise ImageError(f"number {position} ({type(image).__name__})", _ACCEPTED)


_ACCEPTED = "give a path, bytes, an open file, a PIL image, an array (height, width, 3) or a tensor (3, height, width)"


def _from_file(file: Any, name: str, as_stored: bool) -> Image.Image:
    data = file.read(MAX_FILE_BYTES + 1)
    if not isinstance(data, bytes):
        raise ImageError(name, 'the file is open as text; open it with mode "rb"')
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(name, f"it has more than the {MAX_FILE_BYTES:,} bytes allowed")
    return decode_image(data, name=name, as_stored=as_stored)


def _from_pil(image: Image.Image, position: int, as_stored: bool) -> Image.Image:
    name = str(getattr(image, "filename", "") or f"number {position} (PIL image)")
    if 0 in image.size:
        raise ImageError(name, f"its size is {image.width} x {image.height} pixels")
    try:
        if as_stored:
            return image.copy()
        # A file that Pillow opened is not upright yet, nor even decoded.
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders fail on damaged data with every kind of exception
        raise ImageError(name, " ".join(str(error).split()) or type(error).__name__) from error


def _from_array(values: np.ndarray[Any, Any], name: str) -> Image.Image:
    """Makes a PIL image of values (H, W, 3) or (H, W)."""
    if values.size == 0:
        raise ImageError(name, "it has no pixels")
    if np.issubdtype(values.dtype, np.floating):
        low, high = float(values.min()), float(values.max())
        if not (low >= 0.0 and high <= 1.0):  # also if they are not numbers
            raise ImageError(name, f"its floating-point values must be in 0..1, but are {low:g} to {high:g}")
        values = np.rint(values * 255.0).astype(np.uint8)
    if values.dtype != np.uint8:
        raise ImageError(name, f"its type is {values.dtype}; give uint8 in 0..255 or floating point in 0..1")
    return Image.fromarray(np.ascontiguousarray(values)).convert("RGB")
