"""Reads ordinary files alone, and no more bytes than stated: a pipe would be waited for, a device has no end."""

import errno
import os
import stat
from typing import IO


def open_ordinary(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a file for unbuffered reading. Raises OSError for a folder, a pipe, a socket or a device."""
    # Without O_NONBLOCK, opening a pipe would wait for somebody who writes into it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not an ordinary file", os.fspath(path))
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_ordinary(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Reads a whole file. Raises OSError if it is larger than `max_bytes`, or as `open_ordinary` does."""
    with open_ordinary(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            reason = f"its {size:,} bytes are more than the {max_bytes:,} allowed"
            raise OSError(errno.EFBIG, reason, os.fspath(path))
        return file.read(size)
