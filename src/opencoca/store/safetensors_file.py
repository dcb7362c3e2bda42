"""Reads safetensors files that may be damaged or malicious, and writes them whole or not at all.

The header of a file is checked before any of the weights is read.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opencoca.system.files import atomic_write
from opencoca.system.messages import brief

# A model of 2 billion parameters has a header of about 200 kB; the format allows 100 MB, which takes seconds to parse.
MAX_HEADER_BYTES = 8_000_000
_REMEDY = "copy or download it again"
_FLOAT = "float"
# What weights may be stored as: any of the floating-point types, or exactly one of the others.
_KINDS = {
    **dict.fromkeys((torch.float64, torch.float32, torch.float16, torch.bfloat16), _FLOAT),
    **{dtype: str(dtype) for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)},
}
_STORED_KINDS = {
    **dict.fromkeys(("F64", "F32", "F16", "BF16"), _FLOAT),
    **{"I64": "torch.int64", "I32": "torch.int32", "I16": "torch.int16", "I8": "torch.int8"},
    **{"U8": "torch.uint8", "BOOL": "torch.bool"},
}


class TensorInfo(NamedTuple):
    """The shape of a tensor, and whether it holds floating-point numbers or which others."""

    shape: tuple[int, ...]
    kind: str

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorInfo":
        return cls(tuple(tensor.shape), _KINDS.get(tensor.dtype, str(tensor.dtype)))


def is_supported(dtype: torch.dtype) -> bool:
    """Whether weights of this type can be loaded; types of 8 bits and fewer that are no integers cannot."""
    return dtype in _KINDS


def read_tensor_infos(file: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Reads the names, shapes and types of the tensors in a file from its header alone.

    Raises:
        ValueError: the file is damaged or cut short: its header is no JSON or too long, or its tensors overlap, leave
            gaps or end outside of the file; or a tensor is of a type that cannot be computed with.
    """
    with _opened(Path(file)) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: TensorInfo(tuple(part.get_shape()), _kind(file, name, part)) for name, part in slices.items()}


def read_tensors(file: str | os.PathLike[str], device: str = "cpu") -> dict[str, Tensor]:
    """Reads the tensors of a file. On the CPU they are its memory-mapped pages, read when first used.

    Writing to them changes the copy in memory, never the file.

    Raises:
        ValueError: as `read_tensor_infos`.
    """
    with _opened(Path(file), device) as opened:
        for name in opened.keys():  # noqa: SIM118
            _kind(file, name, opened.get_slice(name))
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


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
    wanted = {name: TensorInfo.of(expected[name]) for name in common}
    return listed_names(
        {
            "missing": sorted(expected.keys() - found.keys()),
            "not part of the model": sorted(found.keys() - expected.keys()),
            "of another shape": [
                f"{name} {found[name].shape} instead of {wanted[name].shape}"
                for name in common
                if found[name].shape != wanted[name].shape
            ],
            "of another type": [name for name in common if found[name].kind != wanted[name].kind],
        }
    )


def listed_names(problems: Mapping[str, list[str]]) -> str:
    """Lists, for each problem, how many tensors have it and the first of their names; empty if none has any."""
    return "; ".join(f"{len(names)} {kind} ({first_names(names)})" for kind, names in problems.items() if names)


def first_names(names: list[str], count: int = 3) -> str:
    """The first few of the names, in one line."""
    return ", ".join(brief(name, 80) for name in names[:count]) + (", ..." if len(names) > count else "")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # One pass without a tensor of booleans: where there is a NaN, minimum and maximum are NaN.
    least, greatest = tensor.detach().aminmax()
    return bool(least.isfinite() & greatest.isfinite())


@contextlib.contextmanager
def _opened(file: Path, device: str = "cpu") -> Iterator[Any]:
    _check_lengths(file)
    try:
        with safe_open(file, framework="pt", device=device) as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({brief(error)}); {_REMEDY}") from error


def _kind(file: str | os.PathLike[str], name: str, part: Any) -> str:
    stored = part.get_dtype()
    if stored not in _STORED_KINDS:
        raise ValueError(
            f"{file} holds {brief(name, 60)} as {stored}, which is not supported; store it as F32, F16 or BF16"
        )
    return _STORED_KINDS[stored]


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
