"""Remote data kept in a local folder: pieces of shards, the least recently used ones removed beyond a size limit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from opencoca.system.files import WriteError, atomic_write
from opencoca.system.notice import Notice

_SUFFIX = ".block"
_NUM_LOCKS = 256
_FULL_TO = 0.9


class BlockCache:
    """Files named after what they hold. Processes and machines with a shared disk may use one folder together.

    A block appears whole or not at all. One process fetches it while others that need it wait, and it may be removed
    while it is being read. If the disk can't be written to, nothing is kept and the run goes on.

    Args:
        folder: made if it doesn't exist.
        limit_bytes: of all blocks together; the one just fetched may exceed it for a moment.
    """

    def __init__(self, folder: str | Path, limit_bytes: int):
        if limit_bytes < 1:
            raise ValueError(f"the cache's size limit must be 1 byte or more, got {limit_bytes}")
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self._warned = False

    def read(self, name: str, size: int, fetch: Callable[[], bytes], offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on of the block `name` of `size` bytes, which `fetch` gets if it isn't here."""
        path = self._path(name)
        part = _read_part(path, size, offset, length)
        if part is not None:
            return part
        with self._locked(path.stem):
            part = _read_part(path, size, offset, length)
            if part is not None:  # another process was faster
                return part
            data = fetch()
            assert len(data) == size
            self._store(path, data)
        return data[offset : offset + length]

    def size_bytes(self) -> int:
        """The size of all blocks together."""
        return sum(size for _, size, _ in self._blocks())

    def _path(self, name: str) -> Path:
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self.folder / digest[:2] / f"{digest}{_SUFFIX}"

    def _store(self, path: Path, data: bytes) -> None:
        try:
            with atomic_write(path) as partial:
                partial.write_bytes(data)
            self._make_room(keep=path)
        except WriteError as error:
            if not self._warned:
                warnings.warn(f"remote data are not kept: {error}", Notice, stacklevel=2)
                self._warned = True

    def _make_room(self, keep: Path) -> None:
        blocks = sorted(self._blocks())
        total = sum(size for _, size, _ in blocks)
        if total <= self.limit_bytes:
            return
        for _, size, path in blocks:
            if total <= _FULL_TO * self.limit_bytes:
                break
            if path != keep:
                with contextlib.suppress(OSError):  # another process may have removed it
                    path.unlink()
                total -= size

    def _blocks(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, size, path) of each."""
        for path in self.folder.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Holds a lock of a block, for one process at a time; does nothing where files can't be locked."""
        lock: IO[bytes] | None = None
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            folder = self.folder / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / str(int(name[:8], 16) % _NUM_LOCKS), "wb")  # noqa: SIM115
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()


def _read_part(path: Path, size: int, offset: int, length: int) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != size:
                return None
            os.utime(file.fileno())
            part = os.pread(file.fileno(), length, offset)
    except OSError:
        return None
    return part if len(part) == length else None
