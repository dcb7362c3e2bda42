"""Opens what is to be captioned: files, folders, globs, tar shards and tables, as one source with unique names."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from opencoca.data import (
    ImageError,
    ImageFolder,
    JoinedSource,
    Sample,
    SampleSource,
    ShardStorage,
    TableImages,
    TarShards,
    find_shards,
    list_images,
)
from opencoca.data.compressed import SHARD_SUFFIXES, is_shard_name
from opencoca.data.images import IMAGE_SUFFIXES, read_header
from opencoca.data.names import FileFinder, table_folders
from opencoca.data.opening import parquet_of_images
from opencoca.data.tables import Table, TableColumns, is_table
from opencoca.system.messages import shown
from opencoca.system.notice import LeftOut
from opencoca.system.reading import download_first

_MOST_STDIN_BYTES = 1 << 28


class ShardImages(TarShards):
    """The images of one tar shard, named `SHARD/KEY`."""

    def __init__(self, path: str, storage: ShardStorage | None = None):
        super().__init__([path], storage=storage)

    def key(self, index: int) -> str:
        return f"{self.shards[0]}/{super().key(index)}"


class OneImage(SampleSource):
    """A single image that is in memory."""

    def __init__(self, data: bytes, name: str):
        self.data, self.name = data, name

    def __len__(self) -> int:
        return 1

    def key(self, index: int) -> str:
        return self.name

    def read(self, index: int, *, images: bool = True, texts: bool = True, target: bool = True) -> Sample:
        return Sample((self.data,))


def open_inputs(
    arguments: Iterable[str],
    *,
    image_column: str = "image",
    image_root: str | Path | None = None,
    storage: ShardStorage | None = None,
) -> SampleSource:
    """Opens all images that the arguments name, each once, in their order; those of a folder or glob are sorted.

    Args:
        arguments: image files; folders, searched with their sub-folders for images and tar shards; globs, in which
            `**` stands for any sub-folders; tar shards, also as `shards/{00000..00099}.tar`; tables (CSV, TSV,
            JSON lines, JSON, Parquet) of image files, or that hold the images themselves; and `-` for what standard
            input gives: an image, or any of these names, one a line. Of a folder's tables, the Parquet files that hold
            images are used.
        image_column: the tables' column of images.
        image_root: the folder that image files in tables are relative to; None for the folder of their table, or the
            one in which `opencoca caption` wrote it.
        storage: which members of tar shards are images.

    A file that does not exist or is not an image is part of the result; reading it raises ImageError.

    Raises:
        FileNotFoundError: a shard of a list in braces does not exist.
        ValueError: a folder or glob without images, a table that cannot be used, only shards without images, a web
            address of anything but a shard, an empty standard input.
    """
    collection = _Collection(image_column, None if image_root is None else Path(image_root), storage)
    for argument in arguments:
        collection.add(argument)
    return collection.source()


class _Collection:
    """Collects sources; consecutive files become one source."""

    def __init__(self, image_column: str, image_root: Path | None, storage: ShardStorage | None):
        self.image_column = image_column
        self.storage = storage
        self.image_root = image_root
        self.sources: list[SampleSource] = []
        self.seen: set[str] = set()
        self.files: list[str] = []
        self.unusable: list[ValueError] = []

    def source(self) -> SampleSource:
        self._close_files()
        if self.unusable and not self.sources:
            raise self.unusable[0]
        for error in self.unusable:
            warnings.warn(str(error), LeftOut, stacklevel=2)
        return self.sources[0] if len(self.sources) == 1 else JoinedSource(self.sources)

    def add(self, argument: str) -> None:
        path = Path(argument)
        exists = os.path.lexists(argument)
        if argument == "-" and not exists:
            self._add_stdin()
        elif os.path.isdir(argument):
            self._add_folder(path)
        elif is_shard_name(argument):
            self._add_glob(argument) if glob.has_magic(argument) and not exists else self._add_shards(argument)
        elif "://" in argument and not exists:
            raise ValueError(download_first(argument))
        elif not exists and glob.has_magic(argument):
            self._add_glob(argument)
        elif is_table(argument):
            self._add_table(Table(argument))
        else:
            self._add_file(argument)

    def _add_stdin(self) -> None:
        data = sys.stdin.buffer.read(_MOST_STDIN_BYTES + 1)
        if len(data) > _MOST_STDIN_BYTES:
            raise ValueError(f"standard input gives more than {_MOST_STDIN_BYTES >> 20} MB; give files or folders")
        try:
            read_header(data)
        except ImageError:
            names = [os.fsdecode(line) for line in data.splitlines() if line.strip() and b"\0" not in line]
            if not names or (not data[:512].isascii() and not any(map(os.path.lexists, names))):
                raise ValueError("standard input is neither an image nor a list of images, one a line") from None
            for name in names:
                self._add_file(name) if name == "-" else self.add(name)
            return
        self._close_files()
        self.sources.append(OneImage(data, f"stdin-{hashlib.sha256(data).hexdigest()[:8]}"))

    def _add_glob(self, pattern: str) -> None:
        if "{" in pattern and is_shard_name(pattern):
            self._add_shards(pattern)
            return
        wanted = (*IMAGE_SUFFIXES, *SHARD_SUFFIXES, Path(pattern).suffix.lower() or "/")
        found = 0
        for name in sorted(glob.glob(pattern, recursive=True)):
            if os.path.isdir(name):
                found += self._add_folder(Path(name), may_be_empty=True)
            elif name.lower().endswith(wanted):  # other files in a folder are left out
                self.add(name)
                found += 1
        if not found:
            raise ValueError(f"there are no images that match {pattern!r}")

    def _add_folder(self, folder: Path, *, may_be_empty: bool = False) -> int:
        shards = sorted(
            path
            for path in folder.rglob("*.t*")
            if is_shard_name(path)
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        tables = parquet_of_images(folder, self.image_column, self.unusable)
        images: list[str] = []
        try:
            images = list_images(folder)
        except ValueError:
            if not shards and not tables and not may_be_empty:
                raise
        for key in images:
            self._add_file(str(folder / key))
        for shard in shards:
            self._add_shards(str(shard))
        for table in tables:
            self._add_table(table)
        return len(images) + len(shards) + len(tables)

    def _add_shards(self, pattern: str) -> None:
        for path in find_shards(pattern):
            if path not in self.seen:
                self.seen.add(path)
                self._close_files()
                try:
                    self.sources.append(ShardImages(path, self.storage))
                except ValueError as error:
                    self.unusable.append(error)

    def _add_table(self, table: Table) -> None:
        path = str(table.path)
        if path in self.seen:
            return
        columns = TableColumns(self.image_column, None)
        if table.holds_images(self.image_column):
            self.seen.add(path)
            self._close_files()
            self.sources.append(TableImages(table, columns, self.image_root))
            return
        folders = table_folders(table.path) if self.image_root is None else [self.image_root]
        files = FileFinder(folders)
        for row in table.rows(columns):
            for name in row.images:
                self._add_file(str(Path(files.find(name) or folders[0] / name)))

    def _add_file(self, path: str) -> None:
        if path not in self.seen:
            self.seen.add(path)
            self.files.append(path)

    def _close_files(self) -> None:
        if self.files:
            self.sources.append(ImageFolder("", self.files))
            self.files = []


def text_files_beside(source: SampleSource) -> list[str]:
    """Returns for each image the `.txt` file beside it.

    Raises ValueError if the images are not files of their own, or two would share one.
    """
    paths: list[str] = []
    for part in source.sources if isinstance(source, JoinedSource) else (source,):
        if not isinstance(part, ImageFolder):
            raise ValueError(
                f"{shown(part.key(0))} is not a file of its own, so no text can be put beside it; write one file with "
                "--out"
            )
        paths += [os.path.splitext(part.key(index))[0] + ".txt" for index in range(len(part))]
    owners: dict[str, str] = {}
    for index, path in enumerate(paths):
        if path in owners:
            raise ValueError(
                f"{owners[path]!r} and {source.key(index)!r} would both have their caption in {path!r}; rename one"
            )
        owners[path] = source.key(index)
    return paths


def common_folder(source: SampleSource) -> Path:
    """Returns the folder that contains all files of a source."""
    folders = {os.path.dirname(source.key(index)) for index in range(len(source))}
    try:
        return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
    except ValueError as error:  # files on several drives
        raise OSError(errno.EXDEV, "the images have no folder in common; caption each drive by itself") from error
