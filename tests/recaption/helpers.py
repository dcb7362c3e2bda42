"""A tiny model that captions, and images of many kinds of files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from cli_helpers import draw
from opencoca.generation import GenerationOptions
from opencoca.inference.pipeline import Pipeline
from opencoca.recaption import Captioner


def image_bytes(seed: int) -> bytes:
    buffer = io.BytesIO()
    draw((37 * seed % 200, 91 * seed % 200, 53 * seed % 200), seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, count: int, first: int = 0) -> list[str]:
    """`count` different images in two folders; returns their paths, sorted."""
    paths = []
    for number in range(first, first + count):
        path = folder / f"{'ab'[number % 2]}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
        paths.append(str(path))
    return sorted(paths)


def write_shard(path: Path, seeds: list[int]) -> Path:
    with tarfile.open(path, "w") as archive:
        for seed in seeds:
            data = image_bytes(seed)
            member = tarfile.TarInfo(f"{seed:05d}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def make_captioner(pipeline: Pipeline, **options: object) -> Captioner:
    return Captioner(pipeline, GenerationOptions(**{"max_new_tokens": 8, **options}))  # pyright: ignore
