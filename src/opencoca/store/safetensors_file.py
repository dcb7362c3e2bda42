"""Reads safetensors files that may be damaged or malicious, and writes them whole or not at all.

The header of a file is checked before any of the weights is read.
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

# A model of 2 billion parameters has a header of about 200 kB; the format allows 100 MB, which takes seconds to parse.
MAX_HEADER_BYTES = 8_000_000
_REMEDY = "copy or download it again"


class TensorInfo(NamedTuple):
    """The shape and type of a tensor, as the header states them."""

    shape: tuple[int, ...]
    is_floating_point: bool


def read_tensor_infos(file: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Reads the names, shapes and types of the tensors in a file from its header alone.

    Raises:
        ValueError: the file is damaged or cut short: its header is no JSON or too long, or its tensors overlap, leave
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
    """Reads the tensors of a file. On the CPU they are its memory-mapped pages, read when first used.

    Writing to them changes the copy in memory, never the file.

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
    """Returns the names of the tensors that hold an infinity or NaN."""
    return [name for name, tensor in tensors.items() if not _is_finite(tensor)]


def differences(expected: Mapping[str, Tensor], found: Mapping[str, TensorInfo]) -> str:
    """How the tensors found differ from those expected in names, shapes and types, in words; empty if in nothing."""
    common = sorted(expected.keys() & found.keys())
    wanted = {name: TensorInfo(tuple(expected[name].shape), expected[name].is_floating_point()) for name in common}
    return listed_names(
        {
            "missing": sorted(expected.keys() - found.keys()),
            "not part of the model": sorted(found.keys() - expected.keys()),
            "of another shape": [
                f"{name} {found[name].shape} instead of {wanted[name].shape}"
                for name in common
                if found[name].shape != wanted[name].shape
            ],
            "of another type": [
                name for name in common if found[name].is_floating_point != wanted[name].is_floating_point
            ],
        }
    )


def listed_names(problems: Mapping[str, list[str]]) -> str:
    """Lists, for each problem, how many tensors have it and the first of their names; empty if none has any."""
    return "; ".join(f"{len(names)} {kind} ({first_names(names)})" for kind, names in problems.items() if names)


def first_names(names: list[str], count: int = 3) -> str:
    """The first few of the names, in one line."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # One pass without a tensor of booleans: where there is a NaN, minimum and maximum are NaN.
    least, greatest = tensor.detach().aminmax()
    return bool(least.isfinite() & greatest.isfinite())


def _check_lengths(file: Path) -> None:
    """Checks that the header fits into the file and is not so long that the library would read it for seconds."""
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
    """Turns safetensors' error for a failed write into an OSError with the system's error number."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"(?:os error|code:) (\d+)", str(error))
        code = int(found[1]) if found else None
        raise OSError(code, str(error) if code is None else os.strerror(code)) from error
