"""Reads Parquet files: their rows, and columns of images a group of rows at a time, within bounds of memory."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opencoca.system.messages import brief, shown

_ROWS_AT_A_TIME = 4096
_MAX_GROUP_BYTES = 4 << 30
# A column that would grow this much, to more than this, is no data that anybody has: it was made to fill the memory.
_MAX_GROWTH, _ALWAYS_ALLOWED_BYTES = 100, 64 << 20
_BATCH_BYTES = 256 << 20
_CACHE_BYTES = 256 << 20


class ParquetRows:
    """The columns and rows of a Parquet file.

    Raises ValueError for a file that can't be read, or states more rows than it has bytes.
    """

    def __init__(self, path: Path):
        import pyarrow.parquet as pq

        self.path = path
        with _explained(path):
            file = pq.ParquetFile(path, pre_buffer=False)
            self.schema = file.schema_arrow
        metadata = file.metadata
        if metadata.num_rows > max(1 << 20, os.path.getsize(path)):
            raise ValueError(f"cannot read the table {_name(path)}: it states {metadata.num_rows:,} rows")
        self.columns: list[str] = list(self.schema.names)

    def rows(self, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row's place and its cells of the wanted columns, which alone are read."""
        import pyarrow.parquet as pq

        number = 0
        with _explained(self.path):
            file = pq.ParquetFile(self.path, pre_buffer=False)
            for group in range(file.metadata.num_row_groups):
                stated_size(self.path, file.metadata.row_group(group), group, wanted)
                for batch in file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=list(wanted)):
                    for cells in batch.to_pylist():
                        number += 1
                        yield f"row {number}", cells

    def holds_images(self, column: str) -> bool:
        """Tells whether a column is of bytes, of structs with bytes, or of lists of these."""
        return _holds_bytes(self.schema.field(self.schema.names.index(column)).type)

    def cells(self, column: str) -> ParquetCells:
        """The cells of one column, read when they are asked for."""
        return ParquetCells(self.path, column)


class ParquetCells(Sequence[Any]):
    """One column of a Parquet file. Groups of rows are read whole, and those that were used last are kept.

    Safe to use from several threads and processes.
    """

    def __init__(self, path: Path, column: str):
        import pyarrow.parquet as pq

        self.path, self.column = path, column
        with _explained(path):
            metadata = pq.read_metadata(path)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.ends = np.cumsum(sizes, dtype=np.int64)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._file: Any = None
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_file", "_groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: Any) -> Any:
        group = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[group - 1]) if group else 0
        with _explained(self.path), self._lock:
            return self._group(group)[index - start].as_py()

    def _group(self, group: int) -> Any:
        """The column in one group of rows. Raises ValueError if it can't be read or would fill the memory."""
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        while len(self._groups) > 1 and sum(column.nbytes for column in self._groups.values()) > _CACHE_BYTES:
            self._groups.popitem(last=False)
        self._groups[group] = column = self._read(group)
        return column

    def _read(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._file is None:
            self._file = pq.ParquetFile(self.path, pre_buffer=False)
        size = stated_size(self.path, self._file.metadata.row_group(group), group, [self.column])
        # A value may be stored once and used by all rows, so few are made at a time and their sizes added.
        rows = max(1, min(64, _BATCH_BYTES // max(1, size)))
        parts, total = [], 0
        for batch in self._file.iter_batches(rows, row_groups=[group], columns=[self.column], use_threads=False):
            parts.append(batch.column(0))
            total += parts[-1].nbytes
            if total > _MAX_GROUP_BYTES:
                raise _too_large(self.path, group, total)
        kind = self._file.schema_arrow.field(self.column).type
        return pa.chunked_array(parts, kind)


def stated_size(path: Path, group: Any, number: int, wanted: Sequence[str]) -> int:
    """The number of bytes that columns of a group take when they are read, as the file states it.

    Raises ValueError for more than the memory should be filled with, and for what grows like a decompression bomb.
    """
    stored = full = 0
    for place in range(group.num_columns):
        chunk = group.column(place)
        if chunk.path_in_schema.partition(".")[0] in wanted or chunk.path_in_schema in wanted:
            stored += max(0, chunk.total_compressed_size)
            full += max(0, chunk.total_uncompressed_size)
    if full > max(_ALWAYS_ALLOWED_BYTES, _MAX_GROWTH * stored):
        raise ValueError(
            f"cannot read the table {_name(path)}: {stored:,} bytes in its row group {number} would become {full:,}; "
            "no images or captions are like that"
        )
    if full > _MAX_GROUP_BYTES:
        raise _too_large(path, number, full)
    return full


def _too_large(path: Path, group: int, size: int) -> ValueError:
    return ValueError(
        f"cannot read the table {_name(path)}: its row group {group} would fill {size / 1e9:,.1f} GB of memory; "
        "write it again with smaller row groups"
    )


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        places = [kind.get_field_index(name) for name in ("bytes", "data")]
        return any(place >= 0 and _holds_bytes(kind.field(place).type) for place in places)
    return types.is_binary(kind) or types.is_large_binary(kind)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except GeneratorExit:
        raise
    except Exception as error:  # damaged files make Arrow raise errors of very many kinds
        if type(error) is ValueError and str(error).startswith("cannot read the table"):
            raise
        reason = brief(error) or type(error).__name__
        raise ValueError(f"cannot read the table {_name(path)}: {reason}") from error


def _name(path: Path) -> str:
    return shown(str(path), 100)
