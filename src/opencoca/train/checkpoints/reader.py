"""Reading a stored state: a checkpoint's folder, or the single file of earlier versions."""

import json
from pathlib import Path

import torch
from torch import Tensor

from opencoca.train.checkpoints.index import CheckpointIndex, Layout
from opencoca.train.checkpoints.shard_file import FileRecord, ShardFile, check_file

# Random states in the single file of earlier versions, and what they are called now.
_OLD_RANDOM = {"rng/cpu": "torch", "rng/cuda": "cuda"}


class CheckpointReader:
    """A checkpoint's folder, or the single file. Opening it reads its index; ``check`` reads files through."""

    def __init__(self, path: Path):
        """Raises ValueError, naming the file, if the index is damaged."""
        is_single = path.is_file()
        self.folder = path.parent if is_single else path
        self.index = _single_file_index(path) if is_single else CheckpointIndex.read(path)
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
        names = {key: key.removeprefix(prefix) for key in file.keys if key.startswith(prefix)}
        names |= {key: name for key, name in _OLD_RANDOM.items() if key in file.keys}
        return {name: file.read(key) for key, name in names.items()}

    def _file(self, rank: int) -> ShardFile:
        if rank not in self._opened:
            self._opened[rank] = ShardFile(self.folder / self.index.files[rank].name)
        return self._opened[rank]


def _single_file_index(path: Path) -> CheckpointIndex:
    """What an index would say of the one file in which earlier versions kept the state of a run.

    Raises ValueError if it is damaged or something else.
    """
    file = ShardFile(path)
    try:
        header = json.loads(file.metadata["opencoca"])
        progress, average_updates = dict(header["progress"]), int(header["average_updates"])
        step = progress["step"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not the state of a training run ({error})") from error
    tensors = {key: Layout(file.shape(key), (0,)) for key in file.keys if key not in _OLD_RANDOM}
    record = FileRecord(path.name, path.stat().st_size, None)
    return CheckpointIndex(step, progress, average_updates, (record,), tensors)
