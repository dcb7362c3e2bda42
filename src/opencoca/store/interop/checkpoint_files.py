"""Reads weight files that other projects wrote, without running any code in them.

Formats: safetensors, and the zip archives of `torch.save`, whatever the file's name ends in. Tensors are
memory-mapped: the file is read when its tensors are used.
"""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opencoca.store.interop.numpy_numbers import NUMPY_NUMBERS
from opencoca.store.safetensors_file import is_supported, read_tensors
from opencoca.system.messages import brief, shown

_ZIP_START = b"PK\x03\x04"
# The size of the tensors' description; a model of 2 billion parameters with its optimizer has under 1 MB.
_MAX_PICKLE_BYTES = 4_000_000
_MAX_MEMBERS = 200_000
_PREFIXES = ("module.", "_orig_mod.")
_REMEDY = "copy or download it again"


def read_checkpoint(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the named tensors of a weight file, on the CPU.

    The file holds a state dict, or a training checkpoint that has one under ``state_dict``; NumPy's numbers in it are
    plain data and no obstacle. The prefixes that
    data-parallel training (``module.``) and torch.compile (``_orig_mod.``) put before every name are dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, cut short, of another format, holds more than tensors, or would run code if
            it were unpickled without restrictions.
    """
    path = Path(file)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}; give a .pt, .bin or .safetensors file")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a .pt, .bin or .safetensors file")
    with open(path, "rb") as stream:
        start = stream.read(9)
    is_zip = start.startswith(_ZIP_START)
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and not is_zip):
        content: Any = read_tensors(path)
    elif is_zip:
        content = _load_zip(path)
    else:
        raise ValueError(
            f"{path} is neither safetensors nor what torch.save of PyTorch 1.6 or newer writes; {_REMEDY}, or load it "
            "with the program it comes from and save it again"
        )
    return named_tensors(content, str(path))


def named_tensors(content: Any, label: str) -> dict[str, Tensor]:
    """Returns the named tensors of an object from a file or a program, by the rules of `read_checkpoint`.

    Raises ValueError, whose sentence begins with ``label``, if it is no state dict.
    """
    tensors = _find_state_dict(content, label)
    _check_tensors(tensors, label)
    return _drop_prefixes(tensors)


def _load_zip(path: Path) -> Any:
    _check_zip(path)
    try:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged pickles fail with exceptions of every kind
        raise ValueError(_explain(path, error)) from error


def _check_zip(path: Path) -> None:
    """Refuses archives that unpack to more bytes than they have."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); {_REMEDY}") from error
    if any("/code/" in member.filename for member in members):
        raise ValueError(f"{path} is a TorchScript program, which is not run here; save its state_dict() and give that")
    if len(members) > _MAX_MEMBERS or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError(f"{path} is not what torch.save writes: it is compressed or has too many parts; {_REMEDY}")
    for member in members:
        if member.filename.endswith(".pkl") and member.file_size > _MAX_PICKLE_BYTES:
            raise ValueError(
                f"{path} has a description of its tensors of {member.file_size:,} bytes, where {_MAX_PICKLE_BYTES:,} "
                f"are plenty; {_REMEDY}, or save its state dict alone"
            )


def _explain(path: Path, error: Exception) -> str:
    text = str(error)
    # PyTorch's own message suggests to allow what the file asks for, which nobody should do here.
    wanted = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"\b(?:class|function|type) <?'?([\w.]+)", text)
    if "eights only load failed" in text or "nsupported" in text:
        name = f" ({brief(wanted[1], 60)})" if wanted else ""
        return (
            f"{path} holds more than tensors{name}, which could run code when opened, so it was not; if you trust "
            "where it comes from, load it there and save its state dict alone"
        )
    reason = brief(text) or type(error).__name__
    return f"{path} is damaged or cut short ({reason}); {_REMEDY}"


def _find_state_dict(content: Any, label: str) -> Mapping[str, Any]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{label} holds a {type(content).__name__}, not named tensors; save the model's state_dict()")
    return content


def _check_tensors(tensors: Mapping[str, Any], label: str) -> None:
    if not tensors:
        raise ValueError(f"{label} holds no tensors; save the model's state_dict()")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{label} holds {shown(name, 60)}, which is no tensor but a {type(tensor).__name__}; give a "
                "state dict, or a checkpoint that has one under 'state_dict'"
            )
        found = shown(name, 60)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{label}: the tensor {found} is sparse, quantized or without values; give a dense one")
        if not is_supported(tensor.dtype):
            raise ValueError(
                f"{label}: {found} is {tensor.dtype}, which is not supported; store it as float32 or float16"
            )


def _drop_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = list(tensors)
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return {name: tensor.detach() for name, tensor in zip(names, tensors.values(), strict=True)}
