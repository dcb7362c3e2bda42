"""Compressed tar shards: they are unpacked once, because a compressed file cannot be read from a place within it."""

from __future__ import annotations

import atexit
import bz2
import functools
import gzip
import hashlib
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from opencoca.system.files import atomic_write
from opencoca.system.messages import shown
from opencoca.system.reading import open_ordinary

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tar.xz")

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
_PIECE_BYTES = 4 << 20
# Images cannot be compressed much: what unpacks to more than this is made to fill a disk.
_MAX_RATIO, _SMALL_BYTES = 200, 64 << 20


def is_shard_name(path: object) -> bool:
    """Tells whether a path or URL ends as a tar file's does, compressed or not."""
    return str(path).lower().endswith(SHARD_SUFFIXES)


def compression_of(head: bytes) -> str | None:
    """The name of the compression that a file with these first bytes has; None for none that is known."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def unpacked(path: str, folder: str | None) -> str:
    """The path of a local shard; of a compressed one that of its unpacked copy.

    Args:
        path: the shard.
        folder: where copies lie, to be used again; None for a temporary folder, removed when the process ends.

    A shard that is cut short or damaged is unpacked as far as possible.

    Raises:
        OSError: the shard can't be read, or its copy can't be written.
        ValueError: the package for its compression isn't installed; it unpacks to nothing, or to very much.
    """
    with open_ordinary(path) as file:
        packing, status = compression_of(file.read(8)), os.fstat(file.fileno())
    if packing is None:
        return path
    identity = f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
    name = hashlib.blake2b(os.fsencode(identity), digest_size=16).hexdigest()
    copy = Path(folder if folder is not None else _temporary_folder(), f"{name}.tar")
    if not copy.is_file():
        most = _SMALL_BYTES + _MAX_RATIO * status.st_size
        with _opener(packing, path)(path) as source, atomic_write(copy) as partial, open(partial, "wb") as target:
            _copy(source, target, most, path)
    return str(copy)


def _copy(source: Any, target: IO[bytes], most: int, path: str) -> None:
    total = 0
    while piece := _next_piece(source):
        total += len(piece)
        if total > most:
            raise ValueError(f"the shard {path!r} unpacks to more than {most / 1e6:,.0f} MB; unpack it by hand")
        target.write(piece)
    if not total:
        raise ValueError(f"the shard {shown(path, 140)} is damaged: nothing of it can be unpacked")


def _next_piece(source: Any) -> bytes:
    try:
        return source.read1(_PIECE_BYTES)  # what there is before the damage, too
    except Exception as error:  # of zstd there are two implementations
        if isinstance(error, EOFError | OSError | zlib.error | lzma.LZMAError) or type(error).__name__ == "ZstdError":
            return b""  # damaged; the scan of the copy will tell
        raise


def _opener(packing: str, path: str) -> Callable[[str], Any]:
    if packing == "zstd":
        return _zstd_opener(path)
    return {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[packing]


def _zstd_opener(path: str) -> Callable[[str], Any]:
    try:
        import zstandard
    except ImportError:
        try:
            from compression import zstd  # Python 3.14  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(
                f"reading the shard {path!r}, which is compressed with zstd, needs a package that is not installed; "
                "install the extra: pip install 'opencoca[zstd]', or unpack it first (unzstd)"
            ) from None
        return zstd.open
    decompressor = zstandard.ZstdDecompressor()
    return lambda name: decompressor.stream_reader(open(name, "rb"), read_across_frames=True, closefd=True)


@functools.cache
def _temporary_folder() -> str:
    folder, owner = tempfile.mkdtemp(prefix="opencoca-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not where a forked process ends
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
