"""A drawn data set, a recipe for a tiny model on it, and runs that are stopped at chosen steps."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from opencoca.train import Recipe, load_recipe
from opencoca.train.checkpoints.index import CheckpointIndex
from opencoca.train.checkpoints.reader import CheckpointReader
from opencoca.train.trainer import Trainer, TrainingInterrupted

TIME_KEYS = {"images_per_sec", "tokens_per_sec", "step_ms", "data_wait_ms"}
TIME_KEYS |= {"model_flops_per_sec", "model_flops_utilisation", "memory_bytes"}
_THINGS = ("dog", "cat", "boat", "tree", "red car", "child", "horse", "old man", "bird", "lamp", "bus", "cow")
_PLACES = ("on the sand", "by a river", "in the snow", "near two houses", "under a bridge")


def draw(seed: int, side: int = 40) -> Image.Image:
    """A pattern of 4 x 4 coloured blocks, another one for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


def captions_of(index: int, count: int) -> list[str]:
    """Distinct captions, of different lengths."""
    thing = _THINGS[index % len(_THINGS)] + (f" number {index}" if index >= len(_THINGS) else "")
    return [f"a {thing} {' '.join(_PLACES[(index + k) % 5 : (index + k) % 5 + 1 + k % 2])}" for k in range(count)]


@dataclass(frozen=True)
class Pairs:
    """A folder of images and its table of captions."""

    images: Path
    table: Path
    captions: dict[str, list[str]]


def write_pairs(folder: Path, count: int = 10, captions_per_image: int = 1, prefix: str = "image") -> Pairs:
    images = folder / f"{prefix}s"
    images.mkdir(parents=True)
    captions = {f"{prefix}{i}.png": captions_of(i, captions_per_image) for i in range(count)}
    for index, name in enumerate(captions):
        draw(index).save(images / name)
    table = folder / f"{prefix}s.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        writer.writerows((name, caption) for name, own in captions.items() for caption in own)
    return Pairs(images, table, captions)


def tiny_values(pairs: Pairs, output: Path) -> dict[str, Any]:
    """A recipe of some 60 thousand parameters that validates on what it trains on."""
    return {
        "output": str(output),
        "size": "tiny",
        "model": {
            "embed_dim": 24,
            "image": {
                "image_size": [32, 32],
                "patch_size": 8,
                "width": 32,
                "depth": 2,
                "num_heads": 2,
                "mlp_width": 64,
            },
            "pooler": {"num_queries": 4, "num_heads": 2},
            "text": {
                "context_length": 24,
                "width": 32,
                "unimodal_depth": 1,
                "multimodal_depth": 1,
                "num_heads": 2,
                "mlp_width": 64,
            },
        },
        "data": {
            "train_images": str(pairs.images),
            "train_captions": str(pairs.table),
            "val_images": str(pairs.images),
            "val_captions": str(pairs.table),
            "resize_mode": "squash",
            "num_workers": 0,
        },
        "tokenizer": {"source": "train", "vocab_size": 330, "min_frequency": 1},
        "optimizer": {"learning_rate": 2.0e-3, "warmup_steps": 3},
        "batch_size": 4,
        "epochs": 2,
        "precision": "fp32",
        "device": "cpu",
        "val_max_new_tokens": 4,
    }


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes by dotted key, as on the command line."""
    result = json.loads(json.dumps(base))
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return result


def tiny_recipe(pairs: Pairs, output: Path, **changes: Any) -> Recipe:
    """changes: by key, with two underscores for a dot. Goes through a file, as a user's recipe does."""
    base, dotted = tiny_values(pairs, output), {key.replace("__", "."): value for key, value in changes.items()}
    values = merged(base, dotted)
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        recipe = _read(base, base)
        for key, value in dotted.items():
            recipe = _with_number(recipe, key.split("."), value)
        return recipe
    except (AttributeError, TypeError, ValueError):
        return _read(path, values)


def _with_number(part: Any, keys: list[str], value: object) -> Any:
    """A recipe, or a section of one, with another number; refuses whatever else reading a recipe would change."""
    name, *rest = keys
    old = getattr(part, name)
    if not rest and (type(value) is not type(old) or not isinstance(value, int | float)):
        raise TypeError(name)
    return replace(part, **{name: _with_number(old, rest, value) if rest else value})


_READ: dict[str, Recipe] = {}


def _read(source: Path | dict[str, Any], values: dict[str, Any]) -> Recipe:
    """`load_recipe`, which takes as long as steps of a tiny model: only once for recipes that differ by paths alone."""
    places = {name: values["data"][name] for name in ("train_images", "train_captions", "val_images", "val_captions")}
    if not all(isinstance(place, str) for place in places.values()):
        return load_recipe(source)
    key = json.dumps(values | {"output": "", "data": {**values["data"], **dict.fromkeys(places, "")}}, sort_keys=True)
    if key not in _READ:
        _READ[key] = load_recipe(source)
    return replace(_READ[key], output=values["output"], data=replace(_READ[key].data, **places))


class AfterCall:
    """Calls what it wraps, and then, after the given calls (from 1), the action."""

    def __init__(self, wrapped: Callable[..., Any], calls: set[int], action: Callable[[], object]):
        self.wrapped, self.calls, self.action, self.count = wrapped, calls, action, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.wrapped(*args, **kwargs)
        self.count += 1
        if self.count in self.calls:
            self.action()
        return result


def ask_to_stop(name: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), name)


def run_until_stopped(recipe: Recipe, steps: int = 0, validations: int = 0) -> Trainer:
    """Begins or continues a run and sends it SIGTERM in its nth step, or SIGINT in its nth validation, from now."""
    trainer = Trainer(recipe)
    trainer.step = AfterCall(trainer.step, {steps}, ask_to_stop)  # pyright: ignore
    trainer.validator = AfterCall(trainer.validator, {validations}, lambda: ask_to_stop(signal.SIGINT))  # pyright: ignore
    try:
        trainer.run()
    except TrainingInterrupted:
        return trainer
    raise AssertionError("the run was not stopped")


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint that a run's ``latest`` names."""
    return folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()


def read_state(folder: Path) -> tuple[dict[str, torch.Tensor], CheckpointIndex]:
    """All tensors of a run's newest checkpoint, whole, with every process's random states; and its index."""
    reader = CheckpointReader(newest_checkpoint(folder))
    reader.check(0, 1)
    tensors = {key: reader.read(key) for key in reader.keys}
    for rank in range(len(reader.index.files)):
        tensors |= {f"random/{rank}/{name}": value for name, value in reader.random_state(rank).items()}
    return tensors, reader.index


def files_of_checkpoints(folder: Path) -> dict[str, bytes]:
    """Every file below a run's folder of checkpoints."""
    paths = [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def flip_bit(path: Path, byte: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics without those that are times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME_KEYS} for line in lines]


def content(folder: Path) -> dict[str, bytes]:
    """The files of a run's folder, without the lock that it has while it goes on."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Writing beyond this size fails as on a full disk (with EFBIG in place of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
