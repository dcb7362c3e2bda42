"""Writes files so that they appear whole or not at all."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PARTIAL_NAME = re.compile(r"\.[0-9a-f]{12}\.([0-9a-f]{8})-(\d+)-\d+\.partial")


class WriteError(OSError):
    """A file could not be written; the message is one sentence that names it and the remedy. `errno` is kept."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path to write to; when the block ends, the file written there becomes `path`.

    The temporary file stands in the same folder, which is created if need be; it reaches the disk before it replaces
    the old file in one step. If anything fails it is removed, and the old file stays as it was. Whatever writes the
    temporary file, its permissions become those that ordinary writing would leave: the old file's, or the umask's.

    Raises:
        WriteError: the file cannot be written: disk full, no permission, a folder is in its place.
    """
    target = Path(os.path.realpath(path))  # a link still points to the file, as with ordinary writing
    if target.exists() and not target.is_file():
        # Renaming onto a device such as /dev/stdout would replace the device itself.
        raise WriteError(errno.EINVAL, f"cannot write {path}: it is not an ordinary file; choose another name")
    partial = partial_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_folder(target.parent)
        mode = _ordinary_mode(target, partial)
        yield partial
        flush_to_disk(partial)
        if stat.S_IMODE(partial.stat().st_mode) != mode:  # some writers make a temporary file of their own: 0600
            partial.chmod(mode)
        partial.replace(target)
        flush_to_disk(target.parent)
    except WriteError:
        raise
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all; the same text gives the same bytes on every system."""
    with atomic_write(path) as partial:
        # A file's name may hold bytes of no encoding; they are written as escapes, which JSON reads back.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes a JSON file, as `write_text` does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_error(path: str | os.PathLike[str], error: OSError) -> WriteError:
    """The error in one sentence that names what could not be written and the remedy."""
    reason = error.strerror or str(error)
    message = f"cannot write {path} ({reason}): {_remedy(error.errno)}; what was there before is unchanged"
    return WriteError(error.errno, message)


def check_writable(*paths: str | os.PathLike[str] | None) -> None:
    """Checks before the work begins that its results can be stored, and creates nothing.

    Raises ValueError that names the file.
    """
    for path in filter(None, paths):
        target = Path(path)
        try:
            if target.is_dir():
                raise ValueError(f"cannot write {path}: it is a folder; give the name of a file")
            if target.exists() and not target.is_file():
                raise ValueError(f"cannot write {path}: it is not an ordinary file; choose another name")
            folder = next(parent for parent in target.absolute().parents if parent.exists())
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"cannot write {path} ({reason}); {_remedy(error.errno)}") from error


def partial_path(target: Path) -> Path:
    """The name of a file that will become `target`: of this thread alone, and equally long for every target.

    A killed process leaves it behind; the next process that writes into that folder removes it.
    """
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]
    return target.with_name(f".{digest}.{_place()}-{os.getpid()}-{threading.get_ident()}.partial")


@functools.cache
def _place() -> str:
    """A short name of where numbers of processes are unique: this machine, or this container on it."""
    with contextlib.suppress(OSError):
        names = os.readlink("/proc/self/ns/pid") if os.name == "posix" else ""
        return hashlib.sha256(f"{socket.gethostname()} {names}".encode()).hexdigest()[:8]
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


@functools.lru_cache(maxsize=4096)
def clean_folder(folder: str | Path) -> None:
    """Removes, once in this process, what killed processes of this machine left in a folder."""
    with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
        for entry in entries:
            found = _PARTIAL_NAME.fullmatch(entry.name)
            if found and found[1] == _place() and not _is_running(int(found[2])):
                Path(entry.path).unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere the question would end the process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk. Raises OSError if that fails."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere a folder cannot be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder; its file is complete all the same.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


def _ordinary_mode(target: Path, partial: Path) -> int:
    """The permissions that `target` has, or would have if it were simply opened and written."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        pass
    # Found by creating a file: reading the umask changes it for all threads, and folders may have rules of their own.
    partial.unlink(missing_ok=True)  # left by a killed process of the same number
    partial.touch()
    try:
        return stat.S_IMODE(partial.stat().st_mode)
    finally:
        partial.unlink()


def _remedy(code: int | None) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space or choose a folder on another disk"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a folder that you may write to"
    if code == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if code in (errno.ENOTDIR, errno.EEXIST):
        return "a part of its path is a file; choose another folder"
    return "choose another folder"
