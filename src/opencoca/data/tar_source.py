"""Tar shards as a source: one read for each sample, from a local file, a web server or an object store.

Memory holds the places and keys of the shards in use; captions are read with their image.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opencoca.data.block_cache import BlockCache
from opencoca.data.compressed import SHARD_SUFFIXES, unpacked
from opencoca.data.images import MAX_FILE_BYTES, ImageError
from opencoca.data.languages import in_language
from opencoca.data.read_ahead import parallel_map
from opencoca.data.remote import DEFAULT_RETRIES, RetryPolicy, is_remote, read_range
from opencoca.data.shard_index import load_index
from opencoca.data.shards import CLASS, IMAGE, JSON, TEXT, ChosenMembers, SampleParts, ShardIndex, unique_name
from opencoca.data.source import BadSample, Place, Sample, SampleSource
from opencoca.data.tar_scan import BLOCK, header_fits
from opencoca.data.targets import class_folder
from opencoca.system.messages import shown
from opencoca.system.notice import LeftOut
from opencoca.system.reading import open_ordinary

# Parts of a sample that lie further apart than this are read one at a time.
_MAX_GAP_BYTES = 1 << 16
# Up to this number of samples, keys that two shards share are found; beyond it every key begins with its shard's name.
_MAX_SAMPLES_TO_COMPARE = 5_000_000
_SHARDS_IN_MEMORY = 512
_OPENING_THREADS = 32


@dataclass(frozen=True)
class ShardStorage:
    """What is read of shards, the places of indexes and copies, and the way remote shards are read.

    Args:
        image_member, text_member: endings of the members that are a sample's image and text, such as `seg.png`; None
            for any image, and for `txt`.
        index_dir: folder of sidecars that don't lie beside their shards.
        cache_dir: folder for pieces of remote shards, and for unpacked copies of compressed ones; None keeps nothing
            and reads remote samples one by one.
        cache_gb: size limit of that folder in GB; the least recently used pieces go first.
        block_samples: how many consecutive samples are fetched, and shuffled, as one block.
        retries: of remote reads.
    """

    index_dir: str | None = None
    cache_dir: str | None = None
    cache_gb: float = 50.0
    block_samples: int = 256
    retries: RetryPolicy = DEFAULT_RETRIES
    image_member: str | None = None
    text_member: str | None = None


class _Span(NamedTuple):
    start: int
    stop: int


class TarShards(SampleSource):
    """Samples of tar shards, in the order of the shards and of the samples in them.

    A shard that is damaged keeps the samples around the damage. Samples without an image are listed in
    `missing_images`, these and the ones that damage took in `lost`; a warning for each shard names the first of them.
    Compressed local shards are unpacked first.

    Args:
        paths: the shards: local paths and URLs.
        caption_field: the field of a sample's json that holds its caption or captions.
        label_field: the field of a sample's json that holds its class or answers; where it has none, the sample's
            `.cls` is its class. None: the folder in its key is its class.
        language: of all captions; None: not known.
        storage: where indexes lie and what is kept of remote shards.

    Raises:
        FileNotFoundError: a shard doesn't exist.
        ValueError: no shard holds a sample; a remote one has no index, or an old one.
    """

    captions_in_memory = False

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        caption_field: str = "caption",
        label_field: str | None = "label",
        language: str | None = None,
        storage: ShardStorage | None = None,
    ):
        self.storage = storage or ShardStorage()
        self.caption_field, self.label_field, self.language = caption_field, label_field, language
        self.shards = tuple(map(str, paths))
        self._files: tuple[str, ...] = ()
        """The shards themselves, or unpacked copies of them."""
        self.paths = tuple(Path(path) for path in self.shards if not is_remote(path))
        self.is_remote = any(map(is_remote, self.shards))
        self.cache: BlockCache | None = None
        if self.storage.cache_dir is not None and self.is_remote:
            self.cache = BlockCache(self.storage.cache_dir, round(self.storage.cache_gb * 1e9))
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()
        self._shared_keys: dict[int, str] | None = {}
        """Names of samples whose key an earlier shard has, by index; None for too many samples to compare."""
        self._open()
        if not len(self):
            names = ", ".join(map(repr, self.shards[:3]))
            raise ValueError(f"the {len(self.shards)} tar shards ({names}) hold no images")
        self.missing_images = tuple(sample.key for sample in self.lost if sample.key)

    def _open(self) -> None:
        """Read all indexes, and note how many samples the shards have, which are lost and whose keys are shared."""
        starts, digests, lost, seen = [0], [], [], set()
        kept = self.storage.cache_dir or self.storage.index_dir
        self._files = tuple(path if is_remote(path) else unpacked(path, kept) for path in self.shards)
        threads = _OPENING_THREADS if self.is_remote else 0
        indexes = parallel_map(self._load, range(len(self.shards)), threads, 2 * _OPENING_THREADS)
        for shard, (path, index) in enumerate(zip(self.shards, indexes, strict=True)):
            if index.damage or index.lost:
                warnings.warn(damage_report(path, index), LeftOut, stacklevel=4)
            lost.extend(BadSample("", path, offset, reason) for offset, reason in index.damage)
            lost.extend(BadSample(sample.key, path, sample.offset, sample.reason) for sample in index.lost)
            starts.append(starts[-1] + len(index.keys))
            digests.append(index.digest)
            if starts[-1] > _MAX_SAMPLES_TO_COMPARE:
                self._shared_keys, seen = None, set()
            if self._shared_keys is not None:
                shared = [row for row, key in enumerate(index.keys) if key in seen]
                seen.update(index.keys)
                for row in shared:
                    self._shared_keys[starts[shard] + row] = unique_name(f"{_stem(path)}/{index.keys[row]}", seen)
            self._keep(shard, index)
        self.starts, self.lost, self.digests = np.array(starts, dtype=np.int64), tuple(lost), tuple(digests)

    def _load(self, shard: int) -> ShardIndex:
        chosen = ChosenMembers(self.storage.image_member, self.storage.text_member)
        return load_index(self._files[shard], self.storage.index_dir, chosen)

    def _keep(self, shard: int, index: ShardIndex) -> None:
        with self._lock:
            self._indexes[shard] = index
            # Those of remote shards without a folder of indexes would have to be fetched again.
            can_reload = not self.is_remote or self.storage.index_dir is not None
            while can_reload and len(self._indexes) > _SHARDS_IN_MEMORY:
                self._indexes.popitem(last=False)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def block_starts(self) -> np.ndarray:
        """Index of the first sample of each block: `storage.block_samples` that follow one another in a shard."""
        pairs = itertools.pairwise(self.starts.tolist())
        return np.concatenate([np.arange(first, end, self.storage.block_samples) for first, end in pairs])

    @cached_property
    def blank_captions(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Found by reading every caption; one that can't be read isn't blank."""
        found: list[str] = []
        for index in range(len(self)):
            with contextlib.suppress(ValueError):
                found += [self.key(index) for text in self._captions_of(index) if not text]
        return tuple(found)

    def key(self, index: int) -> str:
        shard, row = self._row(index)
        key = self._index(shard).keys[row]
        if self._shared_keys is None:
            return f"{_stem(self.shards[shard])}/{key}"
        return self._shared_keys.get(index, key)

    def read(self, index: int, *, images: bool = True, texts: bool = True, target: bool = True) -> Sample:
        shard, row = self._row(index)
        field, where = self.label_field, self._where(shard, row)
        in_members = target and field is not None
        parts = self._members(
            shard, row, (IMAGE,) * images + (TEXT, JSON) * (texts or in_members) + (CLASS,) * in_members
        )
        label = None
        if target:
            label = class_folder(self._index(shard).keys[row]) if field is None else parts.target(field, where)
        captions = parts.captions(self.caption_field, where) if texts else []
        return Sample(
            (parts.image or b"",) if images else (), tuple(in_language(filter(None, captions), self.language)), label
        )

    def place(self, index: int) -> Place:
        shard, row = self._row(index)
        return Place(self.shards[shard], int(self._index(shard).members[row, IMAGE, 0]))

    def _captions_of(self, index: int) -> list[str]:
        shard, row = self._row(index)
        return self._members(shard, row, (TEXT, JSON)).captions(self.caption_field, self._where(shard, row))

    def _where(self, shard: int, row: int) -> str:
        return f"the sample {shown(self._index(shard).keys[row], 140)} of {shown(self.shards[shard], 140)}"

    def _row(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, int(index - self.starts[shard])

    def _index(self, shard: int) -> ShardIndex:
        index = self._indexes.get(shard)
        if index is None:
            index = self._load(shard)
            self._keep(shard, index)
        return index

    def _members(self, shard: int, row: int, kinds: tuple[int, ...]) -> SampleParts:
        """Reads the parts of a sample that are of these kinds, in one read if they lie together.

        Raises ImageError if what lies there isn't what the index says.
        """
        index = self._index(shard)
        kinds = tuple(kind for kind in kinds if kind < index.members.shape[1])
        places = [(int(offset), int(size)) for offset, size in index.members[row, list(kinds)]]
        there = [place for place in places if place[0]]
        if not there:
            return SampleParts()
        if (most := max(size for _, size in there)) > MAX_FILE_BYTES:
            where = f"{index.keys[row]} in {self.shards[shard]}"
            raise ImageError(where, f"its {most:,} bytes are more than the {MAX_FILE_BYTES:,} allowed")
        start, stop = min(place[0] for place in there) - BLOCK, max(sum(place) for place in there)
        if stop - start <= sum(size + 2 * BLOCK for _, size in there) + _MAX_GAP_BYTES:
            data = self._read(shard, row, _Span(start, stop))
            pieces = [data[o - start - BLOCK : o - start + size] if o else None for o, size in places]
        else:
            pieces = [self._read(shard, row, _Span(o - BLOCK, o + s)) if o else None for o, s in places]
        for piece, (offset, size) in zip(pieces, places, strict=True):
            if piece is not None and not header_fits(piece[:BLOCK], size):
                reason = "its header is damaged, or the shard has changed since its index was made"
                raise ImageError(f"{index.keys[row]} in {self.shards[shard]}, byte {offset:,}", reason)
        found: list[bytes | None] = [None] * len(SampleParts._fields)
        for kind, piece in zip(kinds, pieces, strict=True):
            found[kind] = piece if piece is None else piece[BLOCK:]
        return SampleParts(*found)

    def _read(self, shard: int, row: int, span: _Span) -> bytes:
        path, size = self._files[shard], span.stop - span.start
        if not is_remote(path):
            return _read_local(path, span)
        if self.cache is not None:
            block = self._block(shard, row)
            if block.stop - block.start <= MAX_FILE_BYTES and block.start <= span.start and span.stop <= block.stop:
                name, block_size = f"{path} {self._index(shard).digest} {block}", block.stop - block.start
                return self.cache.read(
                    name,
                    block_size,
                    lambda: read_range(path, block.start, block_size, self.storage.retries),
                    span.start - block.start,
                    size,
                )
        return read_range(path, span.start, size, self.storage.retries)

    def _block(self, shard: int, row: int) -> _Span:
        """The bytes of the block that a row belongs to: from its first image's sample to its last one's end."""
        first = row - row % self.storage.block_samples
        members = self._index(shard).members[first : first + self.storage.block_samples]
        offsets = members[..., 0]
        start = int(np.where(offsets > 0, offsets, np.iinfo(np.int64).max).min()) - BLOCK
        return _Span(start, int(members.sum(axis=-1).max()))


def _stem(path: str) -> str:
    """A shard's name without folder and ending."""
    name = os.path.basename(path)
    return next((name[: -len(end)] for end in SHARD_SUFFIXES if name.endswith(end)), name)


def damage_report(path: str, index: ShardIndex) -> str:
    """A sentence about a shard's damage and the samples that it lacks."""
    found = [reason for _, reason in index.damage[:1]]
    if len(index.damage) > 1:
        found[0] += f" (and {len(index.damage) - 1} more)"
    whole = f"the {len(index.keys)} whole samples in it are used"
    if index.lost:
        first = index.lost[0]
        reason = f" ({first.reason})" if not index.damage else ""
        others = f" and {len(index.lost) - 1} others" if len(index.lost) > 1 else ""
        whole += f", and {shown(first.key, 140)}{reason}{others} left out"
    return f"tar shard {shown(path, 140)}: {'; '.join([*found, whole])}"


def _read_local(path: str, span: _Span) -> bytes:
    # A file of its own for every read: nothing is shared between threads, or with a forked worker.
    with open_ordinary(path) as file:
        data = os.pread(file.fileno(), span.stop - span.start, span.start)
    if len(data) != span.stop - span.start:
        raise OSError(f"the tar shard {path!r} became shorter while it was in use")
    return data
