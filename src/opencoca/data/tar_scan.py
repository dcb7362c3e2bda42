"""Finds the files in a tar file, damaged or not: each header leads to the next one.

A reader that stops at the first broken header loses everything behind it. This scan goes on, block by block, until the
next header whose checksum is right.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
# Reads (offset, size); fewer bytes come back only at the end of the file.
ReadAt = Callable[[int, int], bytes]

_WITHOUT_DATA = frozenset(
    {tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE}
)
_LARGEST_NAME = 1 << 20


class Member(NamedTuple):
    """A file in a tar file: its bytes lie at `offset`, its header in the 512 bytes before."""

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    """The byte from which on something is wrong, and the reason; `name` is the file that it cuts short, or ""."""

    offset: int
    reason: str
    name: str = ""


@dataclass
class TarScan:
    """Ordinary files in order, every damage, and a digest of all headers that tells two tar files apart."""

    members: list[Member] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    digest: str = ""


def scan_tar(read_at: ReadAt, size: int) -> TarScan:
    """Follow the headers of a tar file of `size` bytes, from front to end. Raises what `read_at` does, nothing else."""
    scan = TarScan()
    if size == 0:
        scan.damage.append(Damage(0, "the file is empty"))
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    offset = 0
    extended: dict[bytes, bytes] = {}
    while offset < size:
        block = read_at(offset, BLOCK)
        if len(block) < BLOCK:
            scan.damage.append(_cut_short(size))
            break
        header = _parse(block)
        if header is None:
            found, is_end = _next_header(read_at, offset, size)
            if not is_end:
                scan.damage.append(Damage(offset, f"it is damaged at byte {offset:,}"))
            if found is None:
                break
            offset, extended = found, {}
            continue
        digest.update(block)
        data, name = offset + BLOCK, header.name
        if b"path" in extended:
            name = extended[b"path"].decode("utf-8", "surrogateescape")
        length = 0 if header.type in _WITHOUT_DATA else int(extended.get(b"size", header.size))
        if data + length > size:
            scan.damage.append(Damage(offset, f"it is cut short within {name!r}", name))
            break
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            extended |= _extended(header.type, read_at(data, min(length, _LARGEST_NAME)))
        elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            if header.isfile():
                scan.members.append(Member(name, data, length))
            extended = {}
        offset = data + -(-length // BLOCK) * BLOCK
    else:
        if size:
            scan.damage.append(_cut_short(size))
    scan.digest = digest.hexdigest()
    return scan


def header_fits(block: bytes, size: int) -> bool:
    """Tells whether these 512 bytes are an undamaged header of a file of `size` bytes; fast, as each sample asks it."""
    if len(block) < BLOCK:
        return False
    try:
        announced, checksum = (int(block[start:stop].strip(b" \0"), 8) for start, stop in ((124, 136), (148, 156)))
    except ValueError:  # damaged, or larger than octal digits can tell
        header = _parse(block)
        return header is not None and header.size == size
    # The sum counts the bytes of its own field as spaces.
    return announced == size and checksum == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _cut_short(size: int) -> Damage:
    return Damage(size, f"it is cut short at byte {size:,}, before its end-of-archive mark")


def _parse(block: bytes) -> tarfile.TarInfo | None:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return None
    return header if header.size >= 0 else None


def _next_header(read_at: ReadAt, offset: int, size: int) -> tuple[int | None, bool]:
    """Finds the next header after a block that is none (None: there is none), and tells whether only zeros are left."""
    is_end = True
    while offset < size:
        block = read_at(offset, BLOCK)
        if block.strip(b"\0"):
            is_end = False
            if len(block) == BLOCK and _parse(block) is not None:
                return offset, False
        offset += BLOCK
    return None, is_end


def _extended(kind: bytes, data: bytes) -> dict[bytes, bytes]:
    """The `path` and `size` that an extended header gives the file after it, if the plain header can't hold them.

    Records are `LENGTH NAME=VALUE` lines (POSIX.1-2001); whatever isn't one ends them.
    """
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {b"path": data.rstrip(b"\0")}
    found: dict[bytes, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            break
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        name, equals, value = record.partition(b"=")
        if equals and (name == b"path" or (name == b"size" and value.isdigit())):
            found[name] = value
    return found
