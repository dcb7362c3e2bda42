"""Shards, and tables of images, with captions and labels out of other tables that name their samples."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opencoca.data.source import Sample, SampleSource, SourceView
from opencoca.data.tables import SampleTable, Table, TableColumns, join_targets
from opencoca.data.targets import Target
from opencoca.system.messages import brief, shown

_IN_SHARD = re.compile(r"(.*?)\.(?:tar(?:\.\w+)?|tgz|tzst)/(.*)", re.DOTALL)


class Recaptioned(SourceView):
    """The samples of a source that tables name, in the source's order, with the tables' captions and targets.

    A sample of a shard is named by its key or as SHARD/KEY, a row of a table of images as TABLE#ROW, as
    `opencoca caption` does; the folders before a shard or table don't count.

    Args:
        source: the samples; their own captions, or targets, remain if no table has any.
        tables: with the columns that are read of them.
        strict: whether names that fit no sample are an error; else they are in `missing_images`.

    Raises FileNotFoundError for such names, ValueError for a table that can't be used.
    """

    def __init__(self, source: SampleSource, tables: Sequence[tuple[Table, TableColumns]], strict: bool = True):
        self.source = source
        self.is_remote, self.lost = source.is_remote, source.lost
        self.paths: tuple[Path, ...] = getattr(source, "paths", ())
        known = _names_of(source)
        whole, missing = SampleTable(), {}
        indices: dict[int, None] = {}
        for table, columns in tables:
            found: dict[str, list[Target]] = {}
            for where, images, texts, target, is_foreign in table.rows(columns):
                if is_foreign:
                    continue
                index = known.get(images[0], known.get(_short(images[0])))
                if len(images) > 1:
                    raise ValueError(f"{where} names {len(images)} images; samples of shards and tables are named one")
                if index is None:
                    missing[images[0]] = None
                    continue
                key = str(index)
                indices[index] = None
                whole.captions[key] = whole.captions.get(key, ()) + tuple(filter(None, texts))
                whole.blank += [source.key(index)] * texts.count("")
                if target is not None:
                    found.setdefault(key, []).append(target)
            whole.targets |= {key: join_targets(key, own, table.path) for key, own in found.items()}
        if not indices or (missing and strict):
            raise _unknown(tables, missing, len(missing) + len(indices))
        self.indices = np.array(sorted(indices), dtype=np.int64)
        self.missing_images, self.blank_captions = tuple(missing), tuple(whole.blank)
        self._captions = whole.captions if any(columns.caption for _, columns in tables) else None
        self._targets = whole.targets if any(columns.label for _, columns in tables) else None
        self.captions_in_memory = self._captions is not None or source.captions_in_memory
        if source.block_starts is not None:
            blocks = np.searchsorted(source.block_starts, self.indices, side="right")
            self.block_starts = np.flatnonzero(np.diff(blocks, prepend=-1))

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> tuple[SampleSource, int]:
        return self.source, int(self.indices[index])

    def read(self, index: int, *, images: bool = True, texts: bool = True, target: bool = True) -> Sample:
        inner, key = int(self.indices[index]), str(self.indices[index])
        parts = {
            "images": images,
            "texts": texts and self._captions is None,
            "target": target and self._targets is None,
        }
        sample = self.source.read(inner, **parts) if any(parts.values()) else Sample(())
        if self._captions is not None:
            sample = sample._replace(texts=self._captions.get(key, ()))
        return sample if self._targets is None else sample._replace(target=self._targets.get(key))

    def replaced(self, index: int) -> tuple[tuple[str, ...] | None, Target | None]:
        """The captions and the target that the tables give a sample; None for what is left to the source."""
        key = str(self.indices[index])
        texts = None if self._captions is None else self._captions.get(key, ())
        return texts, None if self._targets is None else self._targets.get(key)


def _names_of(source: SampleSource) -> dict[str, int]:
    """The samples' indices by what tables may call them."""
    names: dict[str, int] = {}
    for index in range(len(source)):
        key = source.key(index)
        shard = _IN_SHARD.fullmatch(source.place(index).file + "/")
        if shard is None:  # a row of a table
            names[os.path.basename(key)] = index
        else:
            base = os.path.basename(shard[1])
            names[key if key.startswith(f"{base}/") else f"{base}/{key}"] = index
        names[key] = index
    return names


def _short(name: str) -> str:
    if shard := _IN_SHARD.fullmatch(name):
        return f"{os.path.basename(shard[1])}/{shard[2]}"
    return os.path.basename(name) if "#" in name else name


def _unknown(tables: Sequence[tuple[Table, TableColumns]], missing: dict[str, None], count: int) -> FileNotFoundError:
    named = brief(" and ".join(shown(str(table.path), 60) for table, _ in tables), 100)
    first = ", ".join(shown(name, 40) for name in list(missing)[:3])
    return FileNotFoundError(
        f"{len(missing)} of the {count} samples that {named} names are not in the shards or tables of images: {first}"
    )
