"""Safetensors files: reading those that nobody vouches for, and writing so that a file appears whole or not at all.

When one is read, its header is checked before a byte of the weights is touched.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opencoca.system.files import atomic_write

# A model of 2 billion parameters has a header of some 200 kB; the format itself allows 100 MB, which takes seconds.
MAX_HEADER_BYTES = 8_000_000
_REMEDY = "copy or download it again"


class TensorInfo(NamedTuple):
    """What the header says of a tensor."""

    shape: tuple[int, ...]
    is_floating_point: bool


def read_tensor_infos(file: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The names, shapes and kinds of the tensors in a file, from its header alone.

    Raises:
        ValueError: the file is damaged or cut short: a header that is no JSON or too long, tensors that overlap, leave
            gaps or end outside of the file.
    """
    _check_lengths(Path(file))
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: TensorInfo(tuple(part.get_shape()), "F" in part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); {_REMEDY}") from error


def read_tensors(file: str | os.PathLike[str], device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file. On the CPU they are its memory-mapped pages, read when first used; writing to them
    changes the copy in memory, never the file.

    Raises:
        ValueError: as `read_tensor_infos`.
    """
    _check_lengths(Path(file))
    try:
        with safe_open(file, framework="pt", device=device) as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); {_REMEDY}") from error


def write_tensors(file: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Writes contiguous tensors that share no memory, replacing the file in one step.

    Raises WriteError (an OSError) if that fails; an older file then stays as it was.
    """
    with atomic_write(file) as partial, _safetensors_errors_as_os_errors():
        save_file(dict(tensors), partial, metadata={"format": "pt"})


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold a number which is infinite or none."""
    return [name for name, tensor in tensors.items() if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # One pass without a tensor of booleans: NaN is the least and the greatest of whatever it stands among.
    least, greatest = tensor.detach().aminmax()
    return bool(least.isfinite() & greatest.isfinite())


def _check_lengths(file: Path) -> None:
    """The header must fit into the file; and the library would read one of any length, for seconds."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    if size < 8 or header_bytes > size - 8:
        raise ValueError(f"{file} is damaged or cut short (its {size:,} bytes end before its header does); {_REMEDY}")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(
            f"{file} is damaged or no model's (a header of {header_bytes:,} bytes, where {MAX_HEADER_BYTES:,} are "
            f"plenty); {_REMEDY}"
        )


@contextlib.contextmanager
def _safetensors_errors_as_os_errors() -> Iterator[None]:
    """What safetensors says of a failed write, with the number that the system gave for it."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"(?:os error|code:) (\d+)", str(error))
        code = int(found[1]) if found else None
        raise OSError(code, str(error) if code is None else os.strerror(code)) from error
