"""The journal of a run: the results so far, in the order of the images, safely on disk.

Its first line holds the settings of the run, and its number of threads, which rounding depends on; each other line a
block of results. Every line begins with the checksum of the rest. A block is flushed to disk before the next begins,
so a kill or a power cut can damage only the last line. That line is cut off when the journal is opened again, and its
images are done again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from opencoca.recaption.captioner import Row
from opencoca.system.files import WriteError

FORMAT = "opencoca-captions-1"
_HEAD = f'{{"format":"{FORMAT}"'.encode()


class Journal:
    """An open journal; one process at a time can have it open.

    `num_done` is the number of images in it; `header` holds the settings that it was begun with, and `last_batch_size`
    the size of the last batch. Use it in a `with` block.
    """

    def __init__(self, path: str | os.PathLike[str], header: Row, *, overwrite: bool = False):
        """Opens the journal; begins one with this header if there is none or it is to be overwritten.

        Raises:
            ValueError: the file is not a journal, or another process has it open.
            WriteError: it cannot be written.
        """
        self.path = Path(path)
        self.header = header
        self.num_done = 0
        self.last_batch_size: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise _write_error(self.path, error, "nothing was begun") from error
        try:
            self._lock()
            self._end = 0 if overwrite else self._recover()
            self._cut()
            if self._end == 0:
                self._write({"format": FORMAT, "settings": header, "threads": torch.get_num_threads()})
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, rows: list[Row], batch_size: int) -> None:
        """Adds the results of the next images; when this returns they are on disk.

        Raises WriteError if they cannot be written; the journal is then as it was before.
        """
        self._write({"start": self.num_done, "batch_size": batch_size, "rows": rows})
        self.num_done += len(rows)
        self.last_batch_size = batch_size

    def rows(self) -> Iterator[Row]:
        """Yields the results of all images, from the first on."""
        with open(self.path, "rb") as file:
            for number, (content, _) in enumerate(_lines(file)):
                if number:
                    yield from content["rows"]

    def remove(self) -> None:
        """Deletes the file, after its content has been stored elsewhere."""
        self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ValueError(f"another process is at work on {self.path}; let it end, or end it first") from error

    def _recover(self) -> int:
        """Reads the file; returns how many of its bytes are undamaged, 0 if the first line is damaged."""
        end = 0
        with open(self.path, "rb") as file:
            for number, (content, line_end) in enumerate(_lines(file)):
                if number == 0:
                    if content.get("format") != FORMAT:
                        break
                    self.header = content["settings"]
                elif content.get("start") == self.num_done:
                    self.num_done += len(content["rows"])
                    self.last_batch_size = content["batch_size"]
                else:
                    break
                end = line_end
            file.seek(0)
            if end == 0 and not _is_torn_header(file.read(1 << 20)):
                raise ValueError(
                    f"{self.path} is no journal that this version of opencoca can read; remove it, or start over with "
                    "--overwrite"
                )
        return end

    def _cut(self) -> None:
        try:
            os.ftruncate(self._file.fileno(), self._end)
        except OSError as error:
            raise _write_error(self.path, error, "nothing was changed") from error

    def _write(self, content: Row) -> None:
        line = _encode(content)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # if this fails too, the damaged line is cut off at the next start
                os.ftruncate(self._file.fileno(), self._end)
            kept = f"the {self.num_done:,} images that are done are kept, and the same command continues from there"
            raise _write_error(self.path, error, kept) from error
        self._end += len(line)


def journal_threads(path: Path) -> int | None:
    """Returns the number of threads that the run of a journal began with; None if there is none, or it does not say."""
    try:
        with open(path, "rb") as file:
            content, _ = next(_lines(file))
    except (OSError, StopIteration):
        return None
    return content.get("threads")


def _is_torn_header(data: bytes) -> bool:
    """Tells whether this is the beginning of a first line, which a kill can leave."""
    checksum, space, text = data.partition(b" ")
    if checksum.strip(b"0123456789abcdef") or len(checksum) > 8 or (space and len(checksum) < 8) or b"\n" in text:
        return False
    return text.startswith(_HEAD) or _HEAD.startswith(text)


def _encode(content: Row) -> bytes:
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _lines(file: BinaryIO) -> Iterator[tuple[Row, int]]:
    """Yields the content and the end of each line, up to the first damaged one."""
    end = 0
    for line in file:
        end += len(line)
        checksum, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
            return
        yield json.loads(text), end


def _write_error(path: Path, error: OSError, kept: str) -> WriteError:
    reason = error.strerror or str(error)
    remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "make it writable"
    return WriteError(error.errno, f"cannot write {path} ({reason}): {remedy}; {kept}")
