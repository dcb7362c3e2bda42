"""A file that one process holds at a time; the system takes it back when that process ends, however it ends."""

import contextlib
import errno
import os
from io import FileIO
from pathlib import Path

_LARGEST_HOLDER_BYTES = 200


class ProcessLock:
    """The lock that the file ``path`` stands for; where files cannot be locked, every process gets it.

    It keeps out other processes, not other threads of this one. Processes that this one forks do not hold it with it
    (it is a POSIX record lock): workers that outlive a killed process by seconds keep nobody out.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: FileIO | None = None
        self._process = 0

    def take(self) -> str | None:
        """Takes the lock; returns None, or who holds it: the number of a process, and its machine.

        Raises OSError if the file cannot be made.
        """
        try:
            import fcntl
        except ImportError:  # not on Windows
            return None
        while True:
            file = open(self.path, "r+b" if self.path.exists() else "x+b", buffering=0)  # noqa: SIM115
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                with file:
                    is_held = error.errno in (errno.EAGAIN, errno.EACCES)
                    holder = file.read(_LARGEST_HOLDER_BYTES).decode(errors="replace")
                    return (holder or "an unknown number") if is_held else None
            if _is_at(self.path, file):
                break
            file.close()  # its holder gave it back between opening and locking
        self._file, self._process = file, os.getpid()
        with contextlib.suppress(OSError):  # on a full disk nobody learns the number
            file.truncate(0)
            file.write(f"{os.getpid()} on {os.uname().nodename}".encode())
        return None

    def give_back(self) -> None:
        """Gives the lock back and removes its file, if this object has it; in a forked process, does nothing."""
        if self._file is not None and self._process == os.getpid():
            with self._file, contextlib.suppress(OSError):
                self.path.unlink()
            self._file = None

    def __del__(self) -> None:
        self.give_back()


def _is_at(path: Path, file: FileIO) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
