"""Features of a frozen image encoder, computed once and read from a memory-mapped file.

With the frozen stages out of the loop a CPU is enough to train on. A training image is stored in several views: as
evaluation sees it, mirrored, and random crops; which view an epoch uses is a pure function of (seed, epoch, image).
Letters: I images, V views.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from opencoca.data import EvalTransform, SampleSource, TrainTransform, decode_image, mentions_side
from opencoca.data.images import ImageError
from opencoca.data.read_ahead import batches_ahead
from opencoca.data.recaptioned import Recaptioned
from opencoca.data.sources import ImageFolder
from opencoca.data.table_images import TableImages
from opencoca.data.tar_source import TarShards
from opencoca.distributed.world import World
from opencoca.model.coca import CoCa
from opencoca.system.files import WriteError, atomic_write
from opencoca.system.notice import Notice
from opencoca.train.compute import autocast
from opencoca.train.recipe.recipe import Recipe

_BATCH = 32


@dataclass(frozen=True)
class CacheViews:
    """How the stored views are made: ``count`` of them, drawn with ``seed``."""

    evaluation: EvalTransform
    training: TrainTransform | None
    count: int
    seed: int

    def pixels(self, source: SampleSource, image: int, view: int) -> Tensor:
        """(3, H, W) of one view: 0 as evaluation sees it, 1 mirrored, others random crops."""
        picture = decode_image(source.open_bytes(image), name=source.key(image))
        may_flip = not any(mentions_side(caption) for caption in source.captions(image))
        if view < 2 or self.training is None:
            pixels = self.evaluation(picture)
            return pixels.flip(-1) if view == 1 and may_flip else pixels
        generator = np.random.default_rng((self.seed, image, view))
        return self.training(picture, generator, flip=None if may_flip else False)

    def describe(self) -> dict:
        """What the stored values depend on; crops and seed only where there are random views."""
        views = {"preprocess": self.evaluation.config.to_dict(), "views": self.count}
        if self.training is not None and self.count > 2:
            crops = self.training
            views["crops"] = [crops.scale, crops.ratio, crops.flip_probability, crops.color_jitter]
            if crops.rand_augment is not None:
                views["crops"].append(crops.rand_augment)
            views["seed"] = self.seed
        return views


class FeatureCache:
    """Stored features (V, I, ...) in half precision, and which images could not be read.

    stages: how many of the encoder's first stages they have gone through.
    """

    def __init__(self, features: np.memmap, broken: dict[int, str], stages: int):
        self.features, self.broken, self.stages = features, broken, stages

    def read(self, views: np.ndarray, images: np.ndarray) -> Tensor:
        """Features (B, ...) in float16 of these images (B,) in these views (B,)."""
        return torch.from_numpy(np.asarray(self.features[views, images]))


class FeatureCaches:
    """Opens the stored outputs of a model's frozen stages, where the recipe wants them; computes what is missing."""

    def __init__(self, recipe: Recipe, model: CoCa, frozen_stages: int, device: torch.device, training: TrainTransform):
        """training: how training images are augmented; all images are brought to the same size and range."""
        self.recipe, self.device, self.training = recipe, device, training
        self.encoder = model.structure().image_encoder
        self.evaluation = EvalTransform(training.config)
        self.stages = frozen_stages if recipe.encoder.cache_features else 0
        self.folder = Path(recipe.encoder.cache_dir or Path(recipe.output) / "features")

    def open(self, source: SampleSource, label: str, world: World, *, augmented: bool) -> FeatureCache | None:
        """The features of a source's images, None if none are wanted; the main process computes what is missing.

        augmented: in several views, for training. label: what messages call the images.
        Raises ValueError if too many images cannot be read, and WriteError (an OSError) if the disk is full; what is
        done then stays.
        """
        if not self.stages:
            return None
        options, seed = self.recipe.encoder, self.recipe.seed
        views = CacheViews(self.evaluation, self.training, options.cache_views, seed)
        if not augmented:
            views = CacheViews(self.evaluation, None, 1, seed)
        self.encoder.to(self.device).eval()
        if world.size > 1:  # the others wait, and then only open it
            world.on_main(lambda: self._open(source, views, label) and None)
        cache, most = self._open(source, views, label), self.recipe.data.max_bad_share
        if cache.broken:
            message = f"{len(cache.broken)} of {len(source)} {label} are left out: {next(iter(cache.broken.values()))}"
            if len(cache.broken) > most * len(source):
                raise ValueError(f"{message}; that is more than {most:.0%}, remove or repair them")
            warnings.warn(message, Notice, stacklevel=2)
        return cache

    @torch.no_grad()
    def _open(self, source: SampleSource, views: CacheViews, label: str) -> FeatureCache:
        """Opens the features of all images and views.

        The folder's name is a fingerprint of encoder, images and views, so that a stale cache is never used. An
        interrupted computation goes on where it stopped.
        """
        folder = self.folder / _fingerprint(self.encoder, self.stages, source, views, self.recipe.precision)
        folder.mkdir(parents=True, exist_ok=True)
        sample = self._run(torch.zeros(1, 3, *views.evaluation.config.image_size))
        shape = (views.count, len(source), *sample.shape[1:])
        path, progress_path = folder / "features.f16", folder / "progress.json"
        progress = {"rows": 0, "broken": {}}
        size_bytes = 2 * math.prod(shape)
        if progress_path.is_file() and path.is_file() and path.stat().st_size == size_bytes:
            progress = json.loads(progress_path.read_text())
        if progress["rows"] < len(source):
            if not progress["rows"]:
                progress_path.unlink(missing_ok=True)
                _reserve(path, size_bytes)
            features = np.memmap(path, np.float16, "r+", shape=shape)
            self._fill(features, progress, progress_path, source, views, label)
        broken = {int(image): reason for image, reason in progress["broken"].items()}
        return FeatureCache(np.memmap(path, np.float16, "r", shape=shape), broken, self.stages)

    def _fill(
        self,
        features: np.memmap,
        progress: dict[str, Any],
        progress_path: Path,
        source: SampleSource,
        views: CacheViews,
        label: str,
    ) -> None:
        bar = tqdm(total=len(source), initial=progress["rows"], desc=f"features of {label}", unit="img", leave=False)
        for images, pixels, broken in _view_batches(source, views, progress["rows"]):
            for view in range(views.count):
                hidden = self._run(pixels[view])
                features[view, images] = hidden.float().clamp(-65504, 65504).half().cpu().numpy()
            progress["broken"].update({str(image): reason for image, reason in broken.items()})
            progress["rows"] = int(images[-1]) + 1
            if progress["rows"] % (8 * _BATCH) == 0 or progress["rows"] == len(source):
                features.flush()
                with atomic_write(progress_path) as partial:
                    partial.write_text(json.dumps(progress), encoding="utf-8")
            bar.update(len(images))
        bar.close()

    def _run(self, pixels: Tensor) -> Tensor:
        with autocast(self.device, self.recipe.precision):
            return self.encoder.run_stages(pixels.to(self.device), 0, self.stages)


def _reserve(path: Path, size_bytes: int) -> None:
    # A memory-mapped write to a full disk kills the process; asking for the space first gives an error instead.
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            gib = size_bytes / 2**30
            message = (
                f"no room for {gib:.1f} GiB of features in {path.parent} ({error.strerror}): free some space, or set "
                "encoder.cache_dir to a folder on another disk"
            )
            raise WriteError(error.errno, message) from error


def _view_batches(source, views: CacheViews, start: int) -> Iterator[tuple[np.ndarray, list[Tensor], dict[int, str]]]:
    def load(image: int) -> list[Tensor] | str:
        try:
            return [views.pixels(source, image, view) for view in range(views.count)]
        except (ImageError, OSError) as error:
            return str(error)

    blank = torch.zeros(3, *views.evaluation.config.image_size)
    first = start
    for rows in batches_ahead(load, range(start, len(source)), _BATCH, 2):
        images = np.arange(first, first + len(rows))
        first += len(rows)
        broken = {int(image): row for image, row in zip(images, rows, strict=True) if isinstance(row, str)}
        good = [[blank] * views.count if isinstance(row, str) else row for row in rows]
        yield images, [torch.stack([row[view] for row in good]) for view in range(views.count)], broken


def _fingerprint(encoder, stages: int, source: SampleSource, views: CacheViews, precision: str) -> str:
    """A digest of what the features depend on: weights and settings of the stages, images, and how views are made."""
    digest = hashlib.sha256()
    for name, tensor in encoder.stages[:stages].state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    for name, module in encoder.stages[:stages].named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | tuple)}
        digest.update(f"{name} {type(module).__name__} {sorted(plain.items())}".encode())
    digest.update(json.dumps([stages, precision, views.describe()]).encode())
    for path in source.paths if isinstance(source, TarShards | TableImages | Recaptioned) else ():
        digest.update(_stamp(path))
    for image in range(len(source)):
        digest.update(source.key(image).encode("utf-8", "backslashreplace") + b"\0")
        digest.update(_stamp(source.root / source.key(image)) if isinstance(source, ImageFolder) else b"")
        digest.update("\0".join(source.captions(image)).encode() if views.training else b"")
    return digest.hexdigest()[:16]


def _stamp(path: Path) -> bytes:
    # Another file under the same name has another size or time; reading all of them to be sure would take minutes.
    try:
        status = path.stat()
        return f"{status.st_size} {status.st_mtime_ns}".encode()
    except OSError:
        return b"missing"
