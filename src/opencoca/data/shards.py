"""Tar shards as img2dataset and webdataset write them: `key.jpg` next to `key.txt`, `key.json` and/or `key.cls`.

The last ending of a name counts: `a.b.jpg` is the image of the sample `a.b`. Where `a` is a sample with an image and
texts of its own, and `a.b` has no texts, `a.b.jpg` is one more member of `a`, as in webdataset.

A shard is scanned once; its index holds the place of every part of each sample, so that one read gets any sample.
Letters: S samples of a shard.
"""

from __future__ import annotations

import codecs
import json
import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opencoca.data.cells import split_captions
from opencoca.data.compressed import compression_of
from opencoca.data.images import IMAGE_SUFFIXES
from opencoca.data.tar_scan import BLOCK, Member, ReadAt, scan_tar
from opencoca.data.targets import Target, parse_target
from opencoca.system.notice import Notice
from opencoca.system.reading import open_ordinary

IMAGE, TEXT, JSON, CLASS = range(4)
"""The kinds of member a sample is made of, in the order of `ShardIndex.members`."""

_KINDS = {**dict.fromkeys(IMAGE_SUFFIXES, IMAGE), ".txt": TEXT, ".json": JSON, ".cls": CLASS}
MAX_JSON_BYTES = 16 << 20


class ChosenMembers(NamedTuple):
    """The endings of the members that are a sample's image and text, such as `seg.png` and `alt.txt`.

    None: any image, and `txt`.
    """

    image: str | None = None
    text: str | None = None

    def split(self, name: str) -> tuple[str, str, int | None]:
        """Splits a member's name into the sample's key and an ending, and tells the kind of the member, if it has one.

        `a/b.jpg` -> `a/b`, `.jpg`, IMAGE.
        """
        for ending, kind in ((self.image, IMAGE), (self.text, TEXT)):
            if ending and name.lower().endswith(ending := f".{ending.lower().lstrip('.')}"):
                return name[: -len(ending)], ending, kind
        key, ending = os.path.splitext(name)
        kind = _KINDS.get(ending.lower())
        taken = (kind == IMAGE and self.image) or (kind == TEXT and self.text)
        return key, ending.lower(), None if taken else kind


ANY_MEMBERS = ChosenMembers()


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
    """The members of one sample found so far; `ending` is that of its image, `fault` says what keeps it from use."""

    key: str
    start: int
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    ending: str = ""
    fault: str | None = None


def scan_shard(path: str | Path, chosen: ChosenMembers = ANY_MEMBERS) -> ShardIndex:
    """Read a local shard's headers from front to end. Raises OSError if the file can't be read."""
    with open_ordinary(path) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        return index_shard(lambda offset, length: os.pread(descriptor, length, offset), size, str(path), chosen)


def index_shard(read_at: ReadAt, size: int, name: str, chosen: ChosenMembers = ANY_MEMBERS) -> ShardIndex:
    """Indexes a shard of `size` bytes that `read_at` reads; `name` is for messages."""
    if packing := compression_of(read_at(0, BLOCK)):
        raise ValueError(f"the shard {name!r} is compressed with {packing}; unpack it first")
    scan = scan_tar(read_at, size)
    groups = _group(scan.members, chosen)
    damages = [(damage.offset, damage.reason, damage.name) for damage in scan.damage]
    broken = _broken_groups(groups, damages, chosen)
    keys, places, lost = [], [], []
    taken: set[str] = set()
    for number, group in enumerate(groups):
        key = unique_name(_own_key(read_at, group, name), taken)
        reason = broken.get(number) or group.fault or (None if IMAGE in group.places else "it has no image")
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


def unique_name(name: str, taken: set[str]) -> str:
    """The name, or where it is taken the first of `name#2`, `name#3`, ... that isn't; it is added to those taken."""
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}#{number}"
    taken.add(unique)
    return unique


def _group(members: list[Member], chosen: ChosenMembers) -> list[_Group]:
    """Members of equal names make a sample, wherever they stand; a second one of a kind begins another sample."""
    groups: list[_Group] = []
    latest: dict[str, _Group] = {}
    renderings: list[tuple[_Group, Member]] = []  # images that a sample has besides its first
    for member in members:
        key, ending, kind = chosen.split(member.name)
        if kind is None or os.path.basename(key).startswith("."):
            continue
        group = latest.get(key)
        if group is not None and kind == IMAGE and group.ending not in ("", ending):
            renderings.append((group, member))
            continue
        if group is None or kind in group.places:
            group = latest[key] = _Group(key, member.start)
            groups.append(group)
        _put(group, member, kind, ending)
    # Beside a text, an image of another format is the same picture once more; without texts it is a picture of its own.
    for group, member in renderings:
        if not _has_texts(group):
            groups.append(_Group(group.key, member.start))
            _put(groups[-1], member, IMAGE, "")
    return sorted((group for group in groups if not _is_part(group, latest)), key=lambda group: group.start)


def _put(group: _Group, member: Member, kind: int, ending: str) -> None:
    group.places[kind] = (member.offset, member.size)
    if kind == IMAGE:
        group.ending = ending
    if member.dangling:
        group.fault = f"{member.name!r} is a link to {member.dangling!r}, which is not in the shard"


def _has_texts(group: _Group) -> bool:
    return any(kind != IMAGE for kind in group.places)


def _is_part(group: _Group, groups: dict[str, _Group]) -> bool:
    """Tells whether a group, such as `a.seg`, is no sample but further members of the sample `a`."""
    whole, dot, _ = group.key.rpartition(".")
    while dot and "/" not in group.key[len(whole) :]:
        owner = groups.get(whole)
        if owner is not None and IMAGE in owner.places:
            return IMAGE not in group.places or (_has_texts(owner) and not _has_texts(group))
        whole, dot, _ = whole.rpartition(".")
    return False


def _broken_groups(groups: list[_Group], damage: list[tuple[int, str, str]], chosen: ChosenMembers) -> dict[int, str]:
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
                cut = name and group.key == chosen.split(name)[0] and number == after - 1
                if cut or not usual <= group.places.keys():
                    broken[number] = f"the shard lost a part of it: {reason}"
    return broken


def _own_key(read_at: ReadAt, group: _Group, name: str) -> str:
    """Returns the `key` in a sample's json (often a path), else the name of its members."""
    if JSON not in group.places or group.fault:
        return group.key
    offset, size = group.places[JSON]
    try:
        values = parse_json(read_at(offset, min(size, MAX_JSON_BYTES + 1)))
    except ValueError as error:
        where = f"the sample {group.key!r} of {name!r}"
        warnings.warn(f"{where} has json that cannot be read ({error}); it is ignored", Notice, stacklevel=2)
        return group.key
    key = values.get("key") if isinstance(values, dict) else None
    return key if isinstance(key, str) and key else group.key


def parse_json(data: bytes) -> Any:
    """The value that JSON bytes hold. Raises ValueError, also for what is nested too deeply or very large."""
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class SampleParts(NamedTuple):
    """The members of a sample, by which its captions and its target are found; None for what it hasn't."""

    image: bytes | None = None
    text: bytes | None = None
    details: bytes | None = None
    label: bytes | None = None

    def captions(self, field: str, where: str) -> list[str]:
        """Json's `captions`, else json's caption field, else the text file; "" is a blank one.

        Raises ValueError that begins with `where` for a caption that isn't text, or json that can't be read.
        """
        values = self._values(where, self.text if field == "caption" else None)
        if field == "caption" and values.get("captions") is not None:
            return split_captions(values["captions"], where) if values["captions"] else []
        if values.get(field) is not None:
            return split_captions(values[field], where)
        if self.text is not None and field == "caption":
            return split_captions(decode_text(self.text, where), where)
        return []

    def target(self, field: str, where: str) -> Target | None:
        """Json's label field, else the class file; where labels are stored as captions (field `caption`), these.

        Raises ValueError that begins with `where` for a label that can't be used.
        """
        if field == "caption":
            return parse_target(self.captions(field, where), where)
        values = self._values(where, self.label)
        if values.get(field) is not None:
            return parse_target(values[field], where)
        return None if self.label is None else parse_target(decode_text(self.label, where), where)

    def _values(self, where: str, instead: bytes | None) -> dict[str, object]:
        """The fields of the json; none where it can't be read and there is something `instead` of it."""
        try:
            values = parse_json(self.details or b"{}")
        except ValueError as error:
            if instead is not None:
                return {}
            raise ValueError(f"{where} has json that cannot be read ({error})") from error
        return values if isinstance(values, dict) else {}


def decode_text(data: bytes, where: str) -> str:
    """Text in UTF-8, or in UTF-16 if a byte-order mark says so. Raises ValueError that begins with `where`."""
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{where} has a text that is not UTF-8; save it as UTF-8") from None
