"""Taking tensors out of another project's state dict, each checked, none forgotten."""

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from opencoca.store.interop.checkpoint_files import named_tensors, read_checkpoint
from opencoca.store.safetensors_file import non_finite

StateDictSource = Mapping[str, Tensor] | str | os.PathLike[str]


class TensorReader:
    """Gives the tensors of a state dict by name, checks their shapes, and knows in the end which nobody asked for.

    Args:
        source: a state dict, or a file that holds one; what `read_checkpoint` accepts and drops holds for both.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or source is no state dict and holds none.
    """

    def __init__(self, source: StateDictSource):
        if isinstance(source, Mapping):
            self.label, self.tensors = "the state dict", named_tensors(source, "the state dict")
        else:
            self.label, self.tensors = os.fspath(source), read_checkpoint(source)
        self.taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def has_prefix(self, prefix: str) -> bool:
        """Whether any tensor's name begins so."""
        return any(name.startswith(prefix) for name in self.tensors)

    def count(self, prefix: str) -> int:
        """How many layers there are whose names begin with ``prefix`` and a number: one more than the highest."""
        parts = {name.removeprefix(prefix).split(".")[0] for name in self.tensors if name.startswith(prefix)}
        return max((int(part) + 1 for part in parts if part.isdecimal()), default=0)

    def shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        """The shape of a tensor from which sizes are derived. Raises ValueError if it is missing or has no such."""
        tensor = self._find(name)
        if tensor.ndim != num_dims or 0 in tensor.shape:
            raise ValueError(f"{self.label}: {name} has shape {tuple(tensor.shape)} and not {num_dims} dimensions")
        return tuple(tensor.shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name, in memory of its own.

        Raises ValueError if it is missing, of another shape, or not finite.
        """
        tensor = self._find(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self.label}: {name} has shape {tuple(tensor.shape)}, where {shape} is expected")
        if not tensor.is_floating_point():
            raise ValueError(f"{self.label}: {name} is of type {tensor.dtype}, where a floating-point one is expected")
        if non_finite({name: tensor}):
            raise ValueError(f"{self.label}: {name} holds numbers that are infinite or not a number")
        self.taken.add(name)
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    def take_scale(self, name: str, *shape: int) -> float:
        """1 / temperature, of which the tensor stores the logarithm. Raises ValueError where that cannot be."""
        log_scale = float(self.take(name, *shape))
        if abs(log_scale) > 50:
            raise ValueError(f"{self.label}: {name} is {log_scale:.4g}, which is no logarithm of 1 / temperature")
        return math.exp(log_scale)

    def skip(self, *prefixes: str) -> None:
        """Marks what begins so as known and not needed."""
        self.taken.update(name for name in self.tensors if name.startswith(prefixes))

    def finish(self) -> None:
        """Raises ValueError if there are tensors that nobody took."""
        left = sorted(self.tensors.keys() - self.taken)
        if left:
            listed = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            raise ValueError(f"{self.label} has {len(left)} tensors that the model has no place for: {listed}")

    def _find(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"{self.label} has no tensor {name}")
        return self.tensors[name]
