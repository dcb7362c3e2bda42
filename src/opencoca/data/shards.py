"""Tar shards as img2dataset and webdataset write them: `key.jpg` next to `key.txt` and/or `key.json`.

Each shard is scanned once. What the scan found (offsets and captions) is kept beside it in `<shard>.index.json`, so
that opening a thousand shards is a thousand small reads and any image is one seek away. A shard that is damaged or cut
short keeps every sample before the damage.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from opencoca.data.files import atomic_writer
from opencoca.data.images import IMAGE_SUFFIXES
from opencoca.data.tables import split_captions

INDEX_SUFFIX = ".index.json"
_INDEX_VERSION = 1
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class ShardSample:
    """One sample of a shard; `offset` and `size` say in bytes where its image lies, "" stands for a blank caption."""

    key: str
    offset: int
    size: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds: samples in order, keys of samples without an image, and what is wrong with the file."""

    samples: tuple[ShardSample, ...]
    missing_images: tuple[str, ...]
    damage: str | None


def load_index(path: Path, caption_field: str = "caption") -> ShardIndex:
    """The index of one shard: from its sidecar file if that is still valid, else by a scan, which is then kept.

    The sidecar is ignored once the shard's size or modification time changed or another caption field is asked for.
    A folder that can't be written to is no error: the index then lives in memory only.
    """
    status = path.stat()
    stamp = {
        "version": _INDEX_VERSION,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "caption_field": caption_field,
    }
    sidecar = path.with_name(path.name + INDEX_SUFFIX)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(sidecar.read_text(encoding="utf-8"))
        if all(stored[name] == value for name, value in stamp.items()):
            samples = (ShardSample(**{**row, "captions": tuple(row["captions"])}) for row in stored["samples"])
            return ShardIndex(tuple(samples), tuple(stored["missing_images"]), stored["damage"])
    index = scan_shard(path, caption_field)
    with contextlib.suppress(OSError), atomic_writer(sidecar) as file:
        file.write(json.dumps({**stamp, **asdict(index)}, ensure_ascii=False).encode())
    return index


@dataclass
class _Group:
    """The members of one sample, as they are met."""

    key: str
    image: tuple[int, int] | None = None
    text: tuple[int, int] | None = None
    json: tuple[int, int] | None = None


@dataclass
class _Scan:
    groups: dict[str, _Group] = field(default_factory=dict)
    damage: str | None = None
    damaged_key: str | None = None


def scan_shard(path: Path, caption_field: str = "caption") -> ShardIndex:
    """Read a shard from front to end and return its index, up to the first damage if there is any."""
    with open(path, "rb") as file:
        scan = _scan_members(path, file)
        samples: list[ShardSample] = []
        missing: list[str] = []
        for group in _whole_groups(scan):
            key, captions = _read_texts(file, group, caption_field, path)
            if group.image is None:
                missing.append(key)
            else:
                samples.append(ShardSample(key, *group.image, tuple(captions)))
    return ShardIndex(tuple(samples), tuple(missing), scan.damage)


def _whole_groups(scan: _Scan) -> list[_Group]:
    """All samples but the one that the damage hit: known by name, or by lacking what the first sample has."""
    groups = list(scan.groups.values())
    if scan.damage and groups:
        first, last = groups[0], groups[-1]
        lacks_text = last.text is None and first.text is not None
        lacks_json = last.json is None and first.json is not None
        if last.key == scan.damaged_key or lacks_text or lacks_json:
            groups.pop()
    return groups


def _scan_members(path: Path, file: BinaryIO) -> _Scan:
    scan = _Scan()
    size = os.fstat(file.fileno()).st_size
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                key, _, suffix = _split_name(member.name)
                if member.offset_data + member.size > size:
                    scan.damage, scan.damaged_key = f"it is cut short within {member.name!r}", key
                    return scan
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if not member.isfile() or os.path.basename(key).startswith("."):
                    continue
                group = scan.groups.setdefault(key, _Group(key))
                place = (member.offset_data, member.size)
                if "." + suffix in IMAGE_SUFFIXES:
                    group.image = place
                elif suffix == "txt":
                    group.text = place
                elif suffix == "json":
                    group.json = place
    except (tarfile.TarError, EOFError, ValueError) as error:
        scan.damage = f"it is damaged after byte {end:,} ({error})"
        return scan
    # tarfile takes a damaged header for the end of the archive; only a block of zeros really is one.
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        scan.damage = f"it is cut short at byte {size:,}, before its end-of-archive mark"
    elif block.strip(b"\0"):
        scan.damage = f"it is damaged after byte {end:,}"
    return scan


def _split_name(name: str) -> tuple[str, str, str]:
    """`a/b.seg.jpg` -> (`a/b`, `.`, `seg.jpg`): webdataset's rule, the first dot of the file's name."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base[1:].partition(".")
    stem = base[:1] + stem
    return (f"{folder}/{stem}" if folder else stem), dot, suffix.lower()


def _read_texts(file: BinaryIO, group: _Group, caption_field: str, path: Path) -> tuple[str, list[str]]:
    """The sample's key and captions: json's `captions`, else json's caption field, else the text file."""
    where = f"the sample {group.key!r} of {str(path)!r}"
    values: dict[str, Any] = {}
    if group.json is not None:
        try:
            parsed = json.loads(_read_at(file, *group.json))
        except ValueError as error:
            warnings.warn(f"{where} has json that cannot be read ({error}); it is ignored", stacklevel=2)
        else:
            values = parsed if isinstance(parsed, dict) else {}
    key = values["key"] if isinstance(values.get("key"), str) and values["key"] else group.key
    if caption_field == "caption" and values.get("captions") is not None:
        return key, split_captions(values["captions"], where) if values["captions"] else []
    if values.get(caption_field) is not None:
        return key, split_captions(values[caption_field], where)
    if group.text is not None and caption_field == "caption":
        return key, split_captions(_read_at(file, *group.text).decode("utf-8", errors="replace"), where)
    return key, []


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def expand_shards(pattern: str) -> list[Path]:
    """Shards named by a path, a glob, or braces: `data/{00000..00099}.tar`, `{cc3m,cc12m}/*.tar`.

    Raises FileNotFoundError naming the first part of the pattern that matches nothing.
    """
    if os.path.exists(pattern):
        return [Path(pattern)]
    paths: list[Path] = []
    for name in _expand_braces(pattern):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * os.path.exists(name)
        if not found:
            raise FileNotFoundError(f"there are no tar shards {name!r}")
        paths.extend(map(Path, found))
    return paths


def _expand_braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    inner = match.group(1)
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if span:
        first, last = span.groups()
        width = len(first) if len(first) == len(last) or first.startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    else:
        choices = inner.split(",")
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def unique_keys(shards: list[tuple[Path, ShardIndex]]) -> list[str]:
    """Every sample's key; one that an earlier sample has already gets its shard's name in front."""
    seen: set[str] = set()
    keys: list[str] = []
    for path, index in shards:
        for sample in index.samples:
            key = sample.key
            if key in seen:
                key = f"{path.stem}/{sample.key}"
            for number in itertools.count(2):
                if key not in seen:
                    break
                key = f"{path.stem}/{sample.key}#{number}"
            seen.add(key)
            keys.append(key)
    return keys
