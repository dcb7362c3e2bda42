"""Images drawn by the tests, folders of them, and a tokenizer of words."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def gradient(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """A smooth RGB image, different for every seed, whose four corners have different colours."""
    rng = np.random.default_rng(seed)
    corners = np.array([[[230, 30, 30], [30, 210, 40]], [[40, 50, 220], [220, 200, 30]]], dtype=np.uint8)
    corners = np.clip(corners.astype(int) + rng.integers(-25, 25, corners.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    if format == "JPEG":
        options.setdefault("quality", 95)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_images(folder: Path, names: list[str], size: tuple[int, int] = (48, 32)) -> None:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(gradient(*size, seed=seed), "PNG" if name.endswith(".png") else "JPEG"))


def huge_png(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG whose header announces these sizes, in a few dozen bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


class WordTokenizer:
    """One id per distinct word, between 1 and 2."""

    pad_id = 0

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode_batch(self, texts: list[str], context_length: int) -> list[list[int]]:
        return [[*self.encode(text)[: context_length - 1], 2] for text in texts]

    def encode(self, text: str) -> list[int]:
        return [1, *(self.ids.setdefault(word, 3 + len(self.ids)) for word in text.split())]

    def decode(self, ids: list[int]) -> str:
        words = {number: word for word, number in self.ids.items()}
        return " ".join(words[number] for number in ids if number > 2)
