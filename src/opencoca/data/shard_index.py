"""The sidecar of a shard: `<shard>.index.npz`, so that a shard is scanned once and its samples are one read away.

It holds keys, places, sizes and damage, and facts of the shard when it was scanned (size, time, the store's tag, digest
of its headers), by which an outdated sidecar is found. Local shards get theirs at first use; for remote ones it is
made by `opencoca data index`, because that reads them from front to end.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opencoca.data.read_ahead import parallel_map
from opencoca.data.remote import RemoteReadError, is_remote, read_file, read_range, remote_status, write_file
from opencoca.data.shards import ANY_MEMBERS, IMAGE, ChosenMembers, LostSample, ShardIndex, index_shard, scan_shard
from opencoca.data.tar_scan import BLOCK
from opencoca.system.files import atomic_write
from opencoca.system.reading import read_ordinary

INDEX_SUFFIX = ".index.npz"
_VERSION = 4
# Made when the first dot of a name ended a sample's key, and (2) when classes were not looked for.
_OLD_VERSIONS = (3, 2)
_READ_BYTES = 16 << 20
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class IndexedShard:
    """A shard with its index; `is_new` tells whether `index_shards` scanned it, else its index existed already."""

    path: str
    index: ShardIndex
    is_new: bool


def load_index(
    path: str | Path, index_dir: str | Path | None = None, chosen: ChosenMembers = ANY_MEMBERS
) -> ShardIndex:
    """The index of one shard: from its sidecar while that fits the shard, else, if the shard is local, by a scan.

    Args:
        path: a local path or a URL.
        index_dir: folder of sidecars that can't lie beside their shards.
        chosen: which members are images and texts.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: a remote shard has no sidecar, or one of an earlier state of the shard.
    """
    if not is_remote(path):
        return _index_one(path, index_dir, chosen).index
    url, now = str(path), _stamp_of(path)
    options = zip(("index-dir", "image-member", "text-member"), (index_dir, *chosen), strict=True)
    given = "".join(f" --{name} {value}" for name, value in options if value)
    remedy = f"make one with `opencoca data index {url}{given}`"
    stored = _read_sidecar(sidecar_place(url, index_dir, chosen), now["size"], allow_old=True)
    if stored is None:
        raise ValueError(f"the remote shard {url!r} has no index; {remedy}")
    if not _is_of(stored[0], now):
        raise ValueError(f"the remote shard {url!r} has changed since its index was made; {remedy}")
    return stored[1]


def index_shards(
    paths: Sequence[str | Path],
    *,
    index_dir: str | Path | None = None,
    chosen: ChosenMembers = ANY_MEMBERS,
    force: bool = False,
    num_workers: int = 4,
) -> Iterator[IndexedShard]:
    """Make the sidecars that are missing or stale, and give every shard's index in turn.

    A sidecar appears whole or not at all, so a stopped call continues when it is repeated.

    Args:
        paths: local paths and URLs.
        index_dir: where sidecars go; None for beside each shard (web servers take none: they need a folder).
        chosen: which members are images and texts.
        force: scan every shard, whatever there is.
        num_workers: shards at a time.

    Raises OSError if a shard can't be read or a sidecar can't be written, ValueError for a web address without
    `index_dir`.
    """
    for path in paths:
        if str(path).startswith(("http://", "https://")) and index_dir is None:
            raise ValueError(f"nothing can be written beside {str(path)!r}; add --index-dir FOLDER for the index")

    def work(path: str | Path) -> IndexedShard:
        return _index_one(path, index_dir, chosen, force=force, must_write=True)

    return parallel_map(work, paths, num_workers, 2 * max(1, num_workers))


def sidecar_place(path: str | Path, index_dir: str | Path | None, chosen: ChosenMembers = ANY_MEMBERS) -> str:
    """Returns the path of a shard's sidecar: beside the shard, or below `index_dir` under the same path.

    Each choice of members has a sidecar of its own.
    """
    choice = "+".join(re.sub(r"[^\w.-]", "_", ending or "") for ending in chosen) if any(chosen) else ""
    suffix = f".{choice}{INDEX_SUFFIX}" if choice else INDEX_SUFFIX
    if index_dir is None:
        return str(path) + suffix
    name = str(path) if is_remote(path) else Path(path).absolute().as_posix()
    parts = [part for part in re.split(r"[/\\:]+|\.\.", name) if part]
    return str(Path(index_dir, *parts)) + suffix


def _index_one(
    path: str | Path,
    index_dir: str | Path | None,
    chosen: ChosenMembers,
    *,
    force: bool = False,
    must_write: bool = False,
) -> IndexedShard:
    """The stored index or a new one, which is stored. A place that can't be written to is an error if `must_write`."""
    now, place = _stamp_of(path), sidecar_place(path, index_dir, chosen)
    stored = None if force else _read_sidecar(place, now["size"])
    if stored is not None and _is_of(stored[0], now):
        return IndexedShard(str(path), stored[1], False)
    if is_remote(path):
        index = index_shard(_Stream(str(path), now["size"]).read_at, now["size"], str(path), chosen)
    else:
        index = scan_shard(path, chosen)
    with contextlib.nullcontext() if must_write else contextlib.suppress(OSError):
        if is_remote(place):
            write_file(place, _pack(index, now))
        else:
            with atomic_write(place) as partial:
                partial.write_bytes(_pack(index, now))
    return IndexedShard(str(path), index, True)


def _read_sidecar(place: str, shard_bytes: int, *, allow_old: bool = False) -> tuple[dict[str, Any], ShardIndex] | None:
    """The stamp and the index in a sidecar of a shard of this size; None if it isn't there or can't be read."""
    try:
        data = read_file(place) if is_remote(place) else read_ordinary(place, shard_bytes + _SLACK_BYTES)
    except RemoteReadError:
        raise
    except OSError:
        return None
    return _unpack(data, shard_bytes, allow_old=allow_old)


def _stamp_of(path: str | Path) -> dict[str, Any]:
    """Returns the facts that tell whether a shard has changed: its size, and its time or its store's tag."""
    if is_remote(path):
        status = remote_status(str(path))
        return {"size": status.size, "mtime_ns": 0, "etag": status.etag}
    status = Path(path).stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "etag": ""}


def _is_of(stored: dict[str, Any], now: dict[str, Any]) -> bool:
    if now["mtime_ns"]:
        return (stored["size"], stored["mtime_ns"]) == (now["size"], now["mtime_ns"])
    # A sidecar made before its shard was uploaded knows no tag; its size must do.
    return stored["size"] == now["size"] and (not stored["etag"] or not now["etag"] or stored["etag"] == now["etag"])


def _pack(index: ShardIndex, stamp: dict[str, Any]) -> bytes:
    facts = {
        "version": _VERSION,
        **stamp,
        "digest": index.digest,
        "lost": index.lost,
        "damage": index.damage,
        "keys": index.keys,
    }
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    np.savez_compressed(buffer, facts=text, members=index.members)
    return buffer.getvalue()


def _unpack(data: bytes, shard_bytes: int, *, allow_old: bool = False) -> tuple[dict[str, Any], ShardIndex] | None:
    """The facts about the shard and its index; None if these bytes are damaged, of another version, or make no sense.

    allow_old: also an index of an earlier version will do.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # A shard has a block for all that its index tells of a member, so an honest index isn't larger.
            if sum(entry.file_size for entry in archive.infolist()) > shard_bytes + _SLACK_BYTES:
                return None
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            facts, members = json.loads(arrays["facts"].tobytes()), arrays["members"]
        index = ShardIndex(
            keys=tuple(facts["keys"]),
            members=members,
            lost=tuple(LostSample(*lost) for lost in facts["lost"]),
            damage=tuple((offset, reason) for offset, reason in facts["damage"]),
            size=facts["size"],
            digest=facts["digest"],
        )
        if facts["version"] not in (_VERSION, *(_OLD_VERSIONS if allow_old else ())) or not _is_sound(index):
            return None
        return {name: facts[name] for name in ("size", "mtime_ns", "etag")}, index
    except Exception:  # what damage does to a zip file has many names
        return None


def _is_sound(index: ShardIndex) -> bool:
    """Tells whether all of a stored index is of the right type, and every place lies within the shard."""
    members, size = index.members, index.size
    if members.dtype != np.int64 or members.ndim != 3 or members.shape[1] not in (3, 4) or members.shape[2] != 2:
        return False
    texts = (*index.keys, index.digest, *(text for lost in index.lost for text in (lost.key, lost.reason)))
    texts += tuple(reason for _, reason in index.damage)
    numbers = (size, *(lost.offset for lost in index.lost), *(offset for offset, _ in index.damage))
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        return False
    offsets, sizes = members[..., 0], members[..., 1]
    there = offsets != 0
    return (
        len(index.keys) == len(members) == len(set(index.keys))
        and bool((offsets[there] >= BLOCK).all() and (offsets[:, IMAGE] != 0).all())
        and bool((sizes >= 0).all() and (sizes <= size).all() and (offsets <= size - sizes).all())
    )


class _Stream:
    """Reads a remote file from front to end in large pieces, however small the reads asked for."""

    def __init__(self, url: str, size: int):
        self.url, self.size = url, size
        self.start, self.piece = 0, b""

    def read_at(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        if not self.start <= offset or offset + length > self.start + len(self.piece):
            wanted = min(max(length, _READ_BYTES), self.size - offset)
            self.start, self.piece = offset, read_range(self.url, offset, wanted) if wanted else b""
        return self.piece[offset - self.start : offset - self.start + length]
