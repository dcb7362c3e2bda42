"""Reads Parquet tables that contain the images: a column of encoded bytes, or of structs {bytes, path}."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from opencoca.data import ImageError, Sample, SampleSource


def has_encoded_images(path: Path, image_column: str) -> bool:
    """Tells whether this is a Parquet file whose image column holds bytes; other faults are not reported here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() != ".parquet" or not path.is_file():
        return False
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return False
    return image_column in schema.names and _bytes_field(schema.field(image_column).type) is not None


def _bytes_field(kind: Any) -> str | None:
    """Tells where the bytes of a cell are: "" for the cell itself, else the name of a struct's field; None: nowhere."""
    import pyarrow.types as types

    if types.is_binary(kind) or types.is_large_binary(kind):
        return ""
    if types.is_struct(kind):
        for name in ("bytes", "data"):
            index = kind.get_field_index(name)
            if index >= 0 and _bytes_field(kind.field(index).type) == "":
                return name
    return None


class ParquetImages(SampleSource):
    """The rows of a Parquet file, named `TABLE#ROW`, rows counted from 0.

    Rows are read a group at a time, and the last two groups are kept: reading in order costs each group once. Safe to
    use from several threads.

    Raises:
        ValueError: the file cannot be read, or the column holds no encoded images.
    """

    def __init__(self, path: str | Path, image_column: str = "image"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = Path(path)
        self.image_column = image_column
        try:
            self._file = pq.ParquetFile(self.path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"cannot read the table {str(path)!r}: {error}") from error
        field = _bytes_field(self._file.schema_arrow.field(image_column).type)
        if field is None:
            raise ValueError(f"the column {image_column!r} of {str(path)!r} holds no encoded images")
        self._field = field
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._lock = threading.Lock()
        self._groups: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def key(self, index: int) -> str:
        return f"{self.path}#{index}"

    def read(self, index: int, *, images: bool = True, texts: bool = True, target: bool = True) -> Sample:
        return Sample((self._image(index),) if images else ())

    def _image(self, index: int) -> bytes:
        group = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        cell = self._column(group, index)[index - start].as_py()
        data = cell.get(self._field) if isinstance(cell, dict) else cell
        if data is None:
            raise ImageError(self.key(index), "the row holds no image")
        return data

    def _column(self, group: int, index: int) -> Any:
        import pyarrow as pa

        with self._lock:
            if group not in self._groups:
                for old in sorted(self._groups, key=lambda number: abs(number - group))[1:]:
                    del self._groups[old]
                try:
                    table = self._file.read_row_group(group, columns=[self.image_column])
                except (pa.ArrowException, OSError) as error:
                    reason = f"row group {group} cannot be read ({' '.join(str(error).split())})"
                    raise ImageError(self.key(index), reason) from error
                self._groups[group] = table.column(self.image_column)
            return self._groups[group]
