"""Tar shards as img2dataset and webdataset write them: `key.jpg` next to `key.txt`, `key.json` and/or `key.cls`.

A shard is scanned once; its index holds the place of every part of each sample, so that one read gets any sample.
Letters: S samples of a shard.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opencoca.data.images import IMAGE_SUFFIXES
from opencoca.data.tables import split_captions
from opencoca.data.tar_scan import BLOCK, Member, ReadAt, scan_tar
from opencoca.data.targets import Target, parse_target

IMAGE, TEXT, JSON, CLASS = range(4)
"""The kinds of member a sample is made of, in the order of `ShardIndex.members`."""


class LostSample(NamedTuple):
    """A sample that a shard names but can't give: near which byte, and why. Key "": damage as such."""

    key: str
    offset: int
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """The content of a shard.

    Attributes:
        keys: of the samples, in the order of their images; a repeated one has `#2`, `#3`, ... behind it.
        members: (S, K, 2) int64: offset and size in bytes of image, text, json and class; offset 0 for what isn't
            there. K is 4, or 3 where no sample has a class.
        lost: samples without an image, or cut in two by damage.
        damage: (offset, reason), wherever the file is damaged.
        size: of the shard in bytes.
        digest: of all headers of the shard.
    """

    keys: tuple[str, ...]
    members: np.ndarray
    lost: tuple[LostSample, ...]
    damage: tuple[tuple[int, str], ...]
    size: int
    digest: str


@dataclass
class _Group:
    """The members of one sample found so far; `suffix` is that of its image."""

    key: str
    start: int
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    suffix: str = ""


def scan_shard(path: str | Path) -> ShardIndex:
    """Read a local shard's headers from front to end. Raises OSError if the file can't be read."""
    with open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        return index_shard(lambda offset, length: os.pread(descriptor, length, offset), size, str(path))


def index_shard(read_at: ReadAt, size: int, name: str) -> ShardIndex:
    """Indexes a shard of `size` bytes that `read_at` reads; `name` is for warnings."""
    scan = scan_tar(read_at, size)
    groups = _group(scan.members)
    broken = _broken_groups(groups, [(damage.offset, damage.reason, damage.name) for damage in scan.damage])
    keys, places, lost = [], [], []
    repeated: Counter[str] = Counter()
    for number, group in enumerate(groups):
        key = _own_key(read_at, group, name)
        repeated[key] += 1
        if repeated[key] > 1:
            key = f"{key}#{repeated[key]}"
        reason = broken.get(number) or (None if IMAGE in group.places else "it has no image")
        if reason is None:
            keys.append(key)
            places.append([group.places.get(kind, (0, 0)) for kind in (IMAGE, TEXT, JSON, CLASS)])
        else:
            lost.append(LostSample(key, group.start, reason))
    members = np.array(places, dtype=np.int64).reshape(-1, 4, 2)
    if not members[:, CLASS].any():
        members = members[:, :CLASS].copy()
    damage = tuple((damage.offset, damage.reason) for damage in scan.damage)
    return ShardIndex(tuple(keys), members, tuple(lost), damage, size, scan.digest)


def _group(members: list[Member]) -> list[_Group]:
    """Members of equal names make a sample, wherever they stand; a second one of a kind begins another sample."""
    groups: list[_Group] = []
    latest: dict[str, _Group] = {}
    for member in members:
        key, suffix = _split_name(member.name)
        if os.path.basename(key).startswith("."):
            continue
        kind = IMAGE if "." + suffix in IMAGE_SUFFIXES else {"txt": TEXT, "json": JSON, "cls": CLASS}.get(suffix)
        group = latest.get(key)
        if group is not None and kind == IMAGE and group.suffix not in ("", suffix):
            continue  # another rendering of the same image
        if group is None or kind in group.places:
            group = latest[key] = _Group(key, member.offset - BLOCK)
            groups.append(group)
        if kind is not None:
            group.places[kind] = (member.offset, member.size)
            group.suffix = suffix if kind == IMAGE else group.suffix
    return groups


def _broken_groups(groups: list[_Group], damage: list[tuple[int, str, str]]) -> dict[int, str]:
    """Why, by number, of the samples next to a damage that lack what samples of this shard usually have."""
    if not damage or not groups:
        return {}
    usual = Counter(frozenset(group.places) for group in groups).most_common(1)[0][0]
    starts = [group.start for group in groups]
    broken: dict[int, str] = {}
    for offset, reason, name in damage:
        after = int(np.searchsorted(starts, offset))
        for number in (after - 1, after):
            if 0 <= number < len(groups):
                group = groups[number]
                cut = name and group.key == _split_name(name)[0] and number == after - 1
                if cut or not usual <= group.places.keys():
                    broken[number] = f"the shard lost a part of it: {reason}"
    return broken


def _split_name(name: str) -> tuple[str, str]:
    """`a/b.seg.jpg` -> (`a/b`, `seg.jpg`): webdataset's rule, the first dot of the file's name."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base[1:].partition(".")
    stem = base[:1] + stem
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def _own_key(read_at: ReadAt, group: _Group, name: str) -> str:
    """Returns the `key` in a sample's json (often a path), else the name of its members."""
    if JSON not in group.places:
        return group.key
    try:
        values = json.loads(read_at(*group.places[JSON]))
    except ValueError as error:
        where = f"the sample {group.key!r} of {name!r}"
        warnings.warn(f"{where} has json that cannot be read ({error}); it is ignored", stacklevel=2)
        return group.key
    key = values.get("key") if isinstance(values, dict) else None
    return key if isinstance(key, str) and key else group.key


class SampleParts(NamedTuple):
    """The members of a sample, by which its captions and its target are found; None for what it hasn't."""

    image: bytes | None = None
    text: bytes | None = None
    details: bytes | None = None
    label: bytes | None = None

    def captions(self, field: str, where: str) -> list[str]:
        """Json's `captions`, else json's caption field, else the text file; "" is a blank one.

        Raises ValueError that begins with `where` for a caption that isn't text.
        """
        values = self._values()
        if field == "caption" and values.get("captions") is not None:
            return split_captions(values["captions"], where) if values["captions"] else []
        if values.get(field) is not None:
            return split_captions(values[field], where)
        if self.text is not None and field == "caption":
            return split_captions(self.text.decode("utf-8", errors="replace"), where)
        return []

    def target(self, field: str, where: str) -> Target | None:
        """Json's label field, else the class file; where labels are stored as captions (field `caption`), these.

        Raises ValueError that begins with `where` for a label that can't be used.
        """
        if field == "caption":
            return parse_target(self.captions(field, where), where)
        values = self._values()
        if values.get(field) is not None:
            return parse_target(values[field], where)
        return None if self.label is None else parse_target(self.label.decode("utf-8", errors="replace"), where)

    def _values(self) -> dict[str, object]:
        try:
            values = json.loads(self.details or b"{}")
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}
