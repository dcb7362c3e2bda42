"""Finds the files in a tar file, damaged or not: each header leads to the next one.

A reader that stops at the first broken header loses everything behind it. This scan goes on, block by block, until the
next header whose checksum is right.
"""

from __future__ import annotations

import hashlib
import posixpath
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
# Headers that say more of the member after them.
_EXTENDING = frozenset({tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK})
_LARGEST_NAME = 1 << 20
_MOST_DIGITS = 19  # of a number in an extended header
_MOST_LINKS = 40  # that lead to one another


class Member(NamedTuple):
    """A file in a tar file: its bytes lie at `offset`, their header in the 512 bytes before.

    Of a link these are another member's; `start` is the place of its own header. `dangling` is what a link names that
    isn't there; it has no bytes.
    """

    name: str
    offset: int
    size: int
    start: int
    dangling: str = ""


class Damage(NamedTuple):
    """The byte from which on something is wrong, and the reason; `name` is the file that it cuts short, or ""."""

    offset: int
    reason: str
    name: str = ""


@dataclass
class TarScan:
    """Ordinary files and links in order, every damage, and a digest of all headers that tells two tar files apart."""

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
    links: dict[int, str] = {}  # the names that members stand for, by their number
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
        if header.type in _EXTENDING:
            extended |= _extended(header.type, read_at(data, min(length, _LARGEST_NAME)))
        elif header.type != tarfile.XGLTYPE:
            if header.islnk() or header.issym():
                links[len(scan.members)] = _target_of(header, name, extended.get(b"linkpath"))
            if header.isfile() or header.islnk() or header.issym():
                scan.members.append(Member(name, data, length, offset))
            extended = {}
        offset = data + -(-length // BLOCK) * BLOCK
    else:
        if size:
            scan.damage.append(_cut_short(size))
    _follow(links, scan.members)
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


def _target_of(header: tarfile.TarInfo, name: str, longer: bytes | None) -> str:
    """The name that a link stands for; a symbolic one is relative to its own folder."""
    target = header.linkname if longer is None else longer.decode("utf-8", "surrogateescape")
    return posixpath.normpath(target if header.islnk() else posixpath.join(posixpath.dirname(name), target))


def _follow(links: dict[int, str], members: list[Member]) -> None:
    """Gives links the place of the file that they lead to."""
    if not links:
        return
    by_name = {posixpath.normpath(member.name): number for number, member in enumerate(members) if number not in links}
    by_link = {posixpath.normpath(members[number].name): target for number, target in links.items()}
    for number, target in links.items():
        last = target
        for _ in range(_MOST_LINKS):
            if last in by_name or last not in by_link:
                break
            last = by_link[last]
        if last in by_name:
            file = members[by_name[last]]
            members[number] = members[number]._replace(offset=file.offset, size=file.size)
        else:
            members[number] = members[number]._replace(offset=0, size=0, dangling=target)


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
    """The `path`, `linkpath` and `size` that an extended header gives the member after it.

    Records are `LENGTH NAME=VALUE` lines (POSIX.1-2001); whatever isn't one ends them.
    """
    if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        return {b"path" if kind == tarfile.GNUTYPE_LONGNAME else b"linkpath": data.rstrip(b"\0")}
    found: dict[bytes, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > _MOST_DIGITS or not len(length) < int(length) <= len(data):
            break
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        name, equals, value = record.partition(b"=")
        is_size = name == b"size" and value.isdigit() and len(value) <= _MOST_DIGITS
        if equals and (is_size or name in (b"path", b"linkpath")):
            found[name] = value
    return found
