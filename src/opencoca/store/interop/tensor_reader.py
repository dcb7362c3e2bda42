"""Takes tensors out of another project's state dict, checks each, and notices those that are left."""

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from opencoca.store.interop.checkpoint_files import named_tensors, read_checkpoint
from opencoca.store.safetensors_file import first_names, non_finite

StateDictSource = Mapping[str, Tensor] | str | os.PathLike[str]


class TensorReader:
    """Gives the tensors of a state dict by name, checks their shapes, and refuses to finish if any is left.

    Args:
        source: a state dict, or a file that holds one; both are read by the rules of `read_checkpoint`.

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
        """Whether the name of any tensor begins with ``prefix``."""
        return any(name.startswith(prefix) for name in self.tensors)

    def drop_prefix(self, prefix: str) -> None:
        """Shortens the names that begin with ``prefix``, except where a tensor has the shorter name already."""
        shorter = {name: name.removeprefix(prefix) for name in self.tensors}
        self.tensors = {
            name if shorter[name] in self.tensors else shorter[name]: tensor for name, tensor in self.tensors.items()
        }

    def count(self, prefix: str) -> int:
        """Returns the number of layers whose names begin with ``prefix`` and a number: one more than the highest."""
        parts = {name.removeprefix(prefix).split(".")[0] for name in self.tensors if name.startswith(prefix)}
        return max((int(part) + 1 for part in parts if part.isdecimal()), default=0)

    def shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        """Returns the shape of a tensor. Raises ValueError if it is missing or has another number of dimensions."""
        tensor = self._find(name)
        if tensor.ndim != num_dims or 0 in tensor.shape:
            raise ValueError(f"{self.label}: {name} has shape {tuple(tensor.shape)} and not {num_dims} dimensions")
        return tuple(tensor.shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """Returns a copy of the tensor of that name.

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

    def affine(self, theirs: str, ours: str, *shape: int) -> dict[str, Tensor]:
        """Takes weight, of this shape, and bias of a linear map, a convolution or a norm, under our names."""
        weight, bias = self.take(f"{theirs}.weight", *shape), self.take(f"{theirs}.bias", shape[0])
        return {f"{ours}.weight": weight, f"{ours}.bias": bias}

    def take_scale(self, name: str, *shape: int) -> float:
        """Returns 1 / temperature, whose logarithm the tensor stores. Raises ValueError for an impossible value."""
        log_scale = float(self.take(name, *shape))
        if abs(log_scale) > 50:
            raise ValueError(f"{self.label}: {name} is {log_scale:.4g}, which is no logarithm of 1 / temperature")
        return math.exp(log_scale)

    def skip(self, *prefixes: str) -> None:
        """Marks the tensors whose names begin with ``prefix`` as known and not needed."""
        self.taken.update(name for name in self.tensors if name.startswith(prefixes))

    def finish(self) -> None:
        """Raises ValueError if there are tensors that were neither taken nor skipped."""
        left = sorted(self.tensors.keys() - self.taken)
        if left:
            listed = first_names(left)
            raise ValueError(f"{self.label} has {len(left)} tensors that the model has no place for: {listed}")

    def _find(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"{self.label} has no tensor {name}")
        return self.tensors[name]
