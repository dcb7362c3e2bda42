"""One process's part of a checkpoint: a safetensors file that is written once, with its checksum, and read by rows.

It is written here and not by the safetensors library, which would copy all tensors first and could not sum up what it
writes.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_BLOCK_BYTES = 1 << 24
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class FileRecord(NamedTuple):
    """What a file must be: its name, its length and the CRC-32 of its content, None if nobody has noted it."""

    name: str
    size_bytes: int
    crc32: int | None


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes tensors, which are on the CPU, to a new file; it has reached the disk when this returns.

    Raises OSError if it cannot be written, and FileExistsError (one of these) if it exists.
    """
    # Widest elements first: every tensor then begins where its elements can be read in place.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, offset = {}, 0
    for key, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    crc, written = 0, 0
    with open(path, "xb") as file:
        for block in _blocks(len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered]):
            crc = zlib.crc32(block, crc)
            file.write(block)
            written += len(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, written, crc)


def _blocks(head: bytes, tensors: list[Tensor]) -> Iterator[Any]:
    yield head
    for tensor in tensors:
        data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(data), _BLOCK_BYTES):
            yield data[start : start + _BLOCK_BYTES]


def check_file(folder: Path, record: FileRecord) -> None:
    """Reads a file through. Raises ValueError, naming it, if it is not what it was when it was written."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.size_bytes:
            raise ValueError(f"{path} is damaged: it has {size:,} bytes and not {record.size_bytes:,}")
        crc = 0
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    if record.crc32 is not None and crc != record.crc32:
        raise ValueError(f"{path} is damaged: the checksum of its content is {crc:08x} and not {record.crc32:08x}")


class ShardFile:
    """A file that was checked, opened for reading; its pages are read when they are needed."""

    def __init__(self, path: Path):
        """Raises ValueError, naming it, if it is not a safetensors file."""
        self.path = path
        try:
            self._file = safe_open(path, framework="pt").__enter__()
            self.keys = frozenset(self._file.keys())
            self.metadata = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error

    def read(self, key: str) -> Tensor:
        """A whole tensor. Raises KeyError if there is none of this name."""
        if key not in self.keys:
            raise KeyError(key)
        return self._file.get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a tensor of at least one dimension. Raises KeyError if there is none of this name."""
        if key not in self.keys:
            raise KeyError(key)
        return self._file.get_slice(key)[start:stop]
