"""Reads ordinary files alone, and no more bytes than stated: a pipe would be waited for, a device has no end."""

import codecs
import errno
import os
import stat
from typing import IO

from opencoca.system.messages import shown


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


def download_first(address: object) -> str:
    """The sentence about a web address where only files are read."""
    return f"{shown(str(address), 160)} is a web address, not a file; download it first, as with `curl -O ADDRESS`"


def read_lines(path: str | os.PathLike[str], content: str, max_bytes: int = 1 << 30) -> list[str]:
    """Reads the lines of a text file that are not blank, stripped.

    Args:
        content: what the file holds, for messages.

    Raises ValueError for a web address and what is not text as `decoded` has it, OSError as `read_ordinary` does.
    """
    if "://" in os.fspath(path) and not os.path.exists(path):
        raise ValueError(download_first(path))
    data = read_ordinary(path, max_bytes)
    try:
        lines = decoded(data).splitlines()
    except ValueError as error:
        raise ValueError(f"cannot read the {content} in {shown(os.fspath(path), 120)}: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def decoded(data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 where a byte-order mark says so. Raises ValueError that says where it is neither."""
    try:
        return data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"line {1 + data.count(10, 0, error.start)} has the byte 0x{data[error.start]:02x}"
        advice = "save it as UTF-8, or convert it: iconv -f cp1252 -t utf-8 OLD > NEW"
        raise ValueError(f"it is not UTF-8 text ({place}); {advice}") from None
