"""Reading a stored state: a checkpoint's folder, or the single file of earlier versions."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from opencoca.train.checkpoints.index import CheckpointIndex
from opencoca.train.checkpoints.shard_file import ShardFile, check_file


class CheckpointReader:
    """A checkpoint's folder. Opening it reads its index; ``check`` reads files through."""

    def __init__(self, folder: Path):
        """Raises ValueError, naming the file, if the index is damaged."""
        self.folder, self.index = folder, CheckpointIndex.read(folder)
        self.keys = frozenset(self.index.tensors)
        self.progress, self.average_updates = self.index.progress, self.index.average_updates
        self._opened: dict[int, ShardFile] = {}

    def check(self, part: int, parts: int) -> None:
        """Checks every ``parts``-th file from ``part`` on. Raises ValueError, naming the first that is damaged."""
        for record in self.index.files[part::parts]:
            check_file(self.folder, record)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.index.tensors[key].shape

    def read(self, key: str) -> Tensor:
        layout = self.index.tensors[key]
        if layout.shape:
            return self.rows(key, 0, layout.shape[0])
        return self._file(layout.ranks[0]).read(key)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        layout = self.index.tensors[key]
        parts = []
        for number, rank in enumerate(layout.ranks):
            first, end = layout.rows(number)
            low, high = max(start, first), min(stop, end)
            if low < high:
                parts.append(self._file(rank).rows(key, low - first, high - first))
        if not parts:  # no row at all, of the right kind
            number = next(
                number for number in range(len(layout.ranks)) if layout.rows(number)[0] < layout.rows(number)[1]
            )
            return self._file(layout.ranks[number]).rows(key, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def random_state(self, rank: int) -> dict[str, Tensor]:
        """The random states of process number ``rank``; empty if there were fewer processes."""
        if rank >= len(self.index.files):
            return {}
        file, prefix = self._file(rank), f"random/{rank}/"
        return {key.removeprefix(prefix): file.read(key) for key in file.keys if key.startswith(prefix)}

    def _file(self, rank: int) -> ShardFile:
        if rank not in self._opened:
            self._opened[rank] = ShardFile(self.folder / self.index.files[rank].name)
        return self._opened[rank]


class SingleFileReader:
    """The one file in which earlier versions kept the state of a run; it has no checksum."""

    def __init__(self, path: Path):
        """Raises ValueError if it is damaged or something else."""
        self.path, self._file = path, ShardFile(path)
        try:
            header = json.loads(self._file.metadata["opencoca"])
            self.progress: dict[str, Any] = dict(header["progress"])
            self.average_updates = int(header["average_updates"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not the state of a training run ({error})") from error

    def check(self, part: int, parts: int) -> None:
        """Reads every ``parts``-th tensor from ``part`` on. Raises ValueError if one cannot be read."""
        try:
            for key in sorted(self._file.keys)[part::parts]:
                self._file.read(key)
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged ({error})") from error

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(key for key in self._file.keys if not key.startswith("rng/"))

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.read(key).shape)

    def read(self, key: str) -> Tensor:
        return self._file.read(key)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        return self._file.rows(key, start, stop)

    def random_state(self, rank: int) -> dict[str, Tensor]:
        if rank > 0:
            return {}
        stored = {"torch": self._file.read("rng/cpu")}
        if "rng/cuda" in self._file.keys:
            stored["cuda"] = self._file.read("rng/cuda")
        return stored
