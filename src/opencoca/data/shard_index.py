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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opencoca.data.read_ahead import parallel_map
from opencoca.data.remote import RemoteReadError, is_remote, read_file, read_range, remote_status, write_file
from opencoca.data.shards import LostSample, ShardIndex, index_shard, scan_shard
from opencoca.system.files import atomic_write

INDEX_SUFFIX = ".index.npz"
_VERSION = 3
_WITHOUT_CLASSES = 2  # an index of this version was made when classes were not looked for
_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class IndexedShard:
    """A shard with its index; `is_new` tells whether `index_shards` scanned it, else its index existed already."""

    path: str
    index: ShardIndex
    is_new: bool


def load_index(path: str | Path, index_dir: str | Path | None = None) -> ShardIndex:
    """The index of one shard: from its sidecar while that fits the shard, else, if the shard is local, by a scan.

    Args:
        path: a local path or a URL.
        index_dir: folder of sidecars that can't lie beside their shards.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: a remote shard has no sidecar, or one of an earlier state of the shard.
    """
    if not is_remote(path):
        return _index_one(path, index_dir).index
    url, now = str(path), _stamp_of(path)
    remedy = f"make one with `opencoca data index {url}{f' --index-dir {index_dir}' if index_dir else ''}`"
    stored = _read_sidecar(sidecar_place(url, index_dir), allow_old=True)
    if stored is None:
        raise ValueError(f"the remote shard {url!r} has no index; {remedy}")
    if not _is_of(stored[0], now):
        raise ValueError(f"the remote shard {url!r} has changed since its index was made; {remedy}")
    return stored[1]


def index_shards(
    paths: Sequence[str | Path], *, index_dir: str | Path | None = None, force: bool = False, num_workers: int = 4
) -> Iterator[IndexedShard]:
    """Make the sidecars that are missing or stale, and give every shard's index in turn.

    A sidecar appears whole or not at all, so a stopped call continues when it is repeated.

    Args:
        paths: local paths and URLs.
        index_dir: where sidecars go; None for beside each shard (web servers take none: they need a folder).
        force: scan every shard, whatever there is.
        num_workers: shards at a time.

    Raises OSError if a shard can't be read or a sidecar can't be written, ValueError for a web address without
    `index_dir`.
    """
    for path in paths:
        if str(path).startswith(("http://", "https://")) and index_dir is None:
            raise ValueError(f"nothing can be written beside {str(path)!r}; add --index-dir FOLDER for the index")

    def work(path: str | Path) -> IndexedShard:
        return _index_one(path, index_dir, force=force, must_write=True)

    return parallel_map(work, paths, num_workers, 2 * max(1, num_workers))


def sidecar_place(path: str | Path, index_dir: str | Path | None) -> str:
    """Returns the path of a shard's sidecar: beside the shard, or below `index_dir` under the same path."""
    if index_dir is None:
        return str(path) + INDEX_SUFFIX
    name = str(path) if is_remote(path) else Path(path).absolute().as_posix()
    parts = [part for part in re.split(r"[/\\:]+|\.\.", name) if part]
    return str(Path(index_dir, *parts)) + INDEX_SUFFIX


def _index_one(
    path: str | Path, index_dir: str | Path | None, *, force: bool = False, must_write: bool = False
) -> IndexedShard:
    """The stored index or a new one, which is stored. A place that can't be written to is an error if `must_write`."""
    now, place = _stamp_of(path), sidecar_place(path, index_dir)
    stored = None if force else _read_sidecar(place)
    if stored is not None and _is_of(stored[0], now):
        return IndexedShard(str(path), stored[1], False)
    if is_remote(path):
        index = index_shard(_Stream(str(path), now["size"]).read_at, now["size"], str(path))
    else:
        index = scan_shard(path)
    with contextlib.nullcontext() if must_write else contextlib.suppress(OSError):
        if is_remote(place):
            write_file(place, _pack(index, now))
        else:
            with atomic_write(place) as partial:
                partial.write_bytes(_pack(index, now))
    return IndexedShard(str(path), index, True)


def _read_sidecar(place: str, *, allow_old: bool = False) -> tuple[dict[str, Any], ShardIndex] | None:
    """The stamp and the index in a sidecar; see `_unpack`. None if it isn't there or can't be read."""
    try:
        data = read_file(place) if is_remote(place) else Path(place).read_bytes()
    except RemoteReadError:
        raise
    except OSError:
        return None
    return _unpack(data, allow_old=allow_old)


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


def _unpack(data: bytes, *, allow_old: bool = False) -> tuple[dict[str, Any], ShardIndex] | None:
    """The facts about the shard and its index; None if these bytes are damaged, or of another version.

    allow_old: also an index that knows of no classes will do.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            facts, members = json.loads(arrays["facts"].tobytes()), arrays["members"]
        versions = (_VERSION, _WITHOUT_CLASSES) if allow_old else (_VERSION,)
        num_samples, num_kinds, _ = members.shape
        if facts["version"] not in versions or num_samples != len(facts["keys"]) or num_kinds not in (3, 4):
            return None
        index = ShardIndex(
            keys=tuple(facts["keys"]),
            members=members,
            lost=tuple(LostSample(*lost) for lost in facts["lost"]),
            damage=tuple((offset, reason) for offset, reason in facts["damage"]),
            size=facts["size"],
            digest=facts["digest"],
        )
        return {name: facts[name] for name in ("size", "mtime_ns", "etag")}, index
    except Exception:  # what damage does to a zip file has many names
        return None


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
