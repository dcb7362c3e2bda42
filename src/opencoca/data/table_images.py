"""Tables that hold the images themselves, with their captions and labels: a source of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from opencoca.data.cells import image_cells, image_in
from opencoca.data.images import ImageError, read_image_file
from opencoca.data.names import FileFinder, table_folders
from opencoca.data.source import Sample, SampleSource
from opencoca.data.tables import DEFAULT_COLUMNS, Table, TableColumns
from opencoca.data.targets import Target
from opencoca.system.messages import brief, shown


class TableImages(SampleSource):
    """The rows of a table whose column of images holds bytes, base64 text, or objects {bytes, path}.

    A sample is named `TABLE#ROW`, rows counted from 0. Of Parquet, the images of a group of rows are read when one of
    them is; text is in memory whole. Where a row has a path and no bytes, that file is read.

    Attributes:
        foreign_rows: those whose captions are in another language than is read.

    Args:
        table: the table.
        columns: of it that are read.
        folder: what paths are relative to; the table's own folder is tried too.

    Raises ValueError for a column that isn't there, and for captions and labels that can't be used.
    """

    def __init__(self, table: Table, columns: TableColumns = DEFAULT_COLUMNS, folder: str | Path | None = None):
        assert columns.image is not None
        self.path = table.path
        self.paths = (table.path,)
        self._cells = table.image_cells(columns.image)
        self._captions: list[tuple[str, ...]] = []
        self._targets: list[Target | None] = []
        blank: list[str] = []
        foreign: list[int] = []
        own = columns._replace(image=None)
        for row in table.rows(own) if own.caption or own.label else ():
            blank += [self.key(len(self._captions))] * row.captions.count("")
            foreign += [len(self._captions)] * row.is_foreign
            self._captions.append(tuple(filter(None, row.captions)))
            self._targets.append(row.target)
        self.blank_captions = tuple(blank)
        self.foreign_rows = frozenset(foreign)
        self._files = FileFinder([*([] if folder is None else [folder]), *table_folders(table.path)])
        ends = getattr(self._cells, "ends", None)
        if ends is not None:
            self.block_starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._cells)

    def key(self, index: int) -> str:
        return f"{self.path}#{index}"

    def read(self, index: int, *, images: bool = True, texts: bool = True, target: bool = True) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no image {index} among {len(self)}")
        return Sample(
            self._images(index) if images else (),
            self._captions[index] if texts and self._captions else (),
            self._targets[index] if target and self._targets else None,
        )

    def _images(self, index: int) -> tuple[bytes, ...]:
        try:
            found = [image_in(cell) for cell in image_cells(self._cells[index])]
        except ValueError as error:
            raise ImageError(self.key(index), brief(error, 200)) from error
        return tuple(self._bytes_of(image, index) for image in found)

    def _bytes_of(self, image: str | bytes | None, index: int) -> bytes:
        if image is None:
            raise ImageError(self.key(index), "the row holds no image")
        if isinstance(image, bytes):
            return image
        path = self._files.find(image)
        if path is None:
            raise ImageError(self.key(index), f"there is no file {shown(image)}")
        return read_image_file(path)
