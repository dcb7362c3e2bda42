"""The one reader of tables: CSV, TSV, JSON lines and Parquet files whose rows name images, captions and labels."""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from opencoca.data.targets import Target, from_json, parse_target, shares

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


class TableColumns(NamedTuple):
    """The names of a table's columns; None for one that isn't read.

    Where a table has no `image`, `caption` or `label` but `images`, `captions` or `labels`, that is read.
    """

    image: str | None = "image"
    caption: str | None = "caption"
    label: str | None = None


DEFAULT_COLUMNS = TableColumns()


class TableRow(NamedTuple):
    """What a row says: where it stands, for messages; names of images; captions, "" for a blank one; a target."""

    where: str
    images: list[str]
    captions: list[str]
    target: Target | None


class Table:
    """A table of any kind: the names of its columns, and what its rows say of images.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it is unreadable, or of an unknown format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        self._holds_json = suffix in (".csv", ".tsv")  # a list is a JSON array there
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no table {str(path)!r}")
        if suffix not in TABLE_SUFFIXES:
            known = ", ".join(TABLE_SUFFIXES[:-1]) + " or " + TABLE_SUFFIXES[-1]
            raise ValueError(f"cannot tell the format of the table {str(path)!r}: expected {known}")
        read = {".parquet": _read_parquet}.get(suffix, _read_csv if self._holds_json else _read_jsonl)
        try:
            self.columns, self._rows = read(self.path)
        except UnicodeDecodeError as error:
            raise ValueError(f"cannot read the table {str(path)!r}: it is not UTF-8 text ({error})") from error
        except (csv.Error, OSError) as error:
            raise ValueError(f"cannot read the table {str(path)!r}: {error}") from error

    def rows(self, columns: TableColumns) -> Iterator[TableRow]:
        """Reads these columns of every row, once.

        Raises ValueError for a column that isn't there, and for a row that names no image, a caption that isn't text or
        a label that can't be used.
        """
        image, caption, label = (column and self._column(column) for column in columns)
        unit = "row" if self.path.suffix.lower() == ".parquet" else "line"
        for number, cells in self._rows:
            where, parse_json = f"{unit} {number} of {str(self.path)!r}", self._holds_json
            yield TableRow(
                where,
                _image_names(cells.get(image), where, parse_json) if image else [],
                split_captions(cells.get(caption), where, parse_json=parse_json) if caption else [],
                parse_target(cells.get(label), where, parse_json=parse_json) if label else None,
            )

    def _column(self, wanted: str) -> str:
        if wanted in self.columns:
            return wanted
        if wanted in ("image", "caption", "label") and f"{wanted}s" in self.columns:
            return f"{wanted}s"
        have = ", ".join(repr(name) for name in self.columns) or "none"
        raise ValueError(f"the table {str(self.path)!r} has no column {wanted!r}; its columns are: {have}")


@dataclass
class SampleTable:
    """The samples that tables describe, by key; `captions` has all of them, in the order of their first row.

    Attributes:
        captions: all captions of a sample, blank ones left out.
        targets: of the samples that have one.
        images: the names of the images, of the samples that have several.
        blank: the key of a sample once for each blank caption.
    """

    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    images: dict[str, tuple[str, ...]] = field(default_factory=dict)
    blank: list[str] = field(default_factory=list)

    def join(self, other: SampleTable) -> None:
        """Adds the samples of another table, and further captions and targets of the same samples."""
        for key, texts in other.captions.items():
            self.captions[key] = self.captions.get(key, ()) + texts
        self.targets |= other.targets
        self.images |= other.images
        self.blank += other.blank


def read_table(
    path: str | Path, columns: TableColumns = DEFAULT_COLUMNS, *, images_root: str | Path = "."
) -> SampleTable:
    """Read a table whose rows hold an image's name with one caption or a list of captions, with a label, or with both.

    A list is a list in JSON lines and Parquet, and a JSON array in CSV. A row of several images is a sample of several,
    and its key is their names with ` + ` between them. Rows of the same images are joined in order of appearance, their
    labels as `parse_target` treats a list. Image names are relative to `images_root`, with `/` between folders;
    absolute ones within it are made relative.

    Raises:
        FileNotFoundError: no such table.
        ValueError: unreadable, of an unknown format, without the columns, or with a row that names no image, an image
            outside of `images_root`, a caption that isn't text, or a label that can't be used.
    """
    found, root = SampleTable(), Path(images_root)
    targets: dict[str, list[Target]] = {}
    classes: dict[str, str] = {}  # one string for each class, however many samples it has
    for where, images, texts, target in Table(path).rows(columns):
        names = tuple(_image_key(name, root, where) for name in images)
        key = " + ".join(names)
        if len(names) > 1:
            found.images[key] = names
        found.captions[key] = found.captions.get(key, ()) + tuple(filter(None, texts))
        found.blank += [key] * texts.count("")
        if target is not None:
            target = classes.setdefault(target, target) if isinstance(target, str) else target
            targets.setdefault(key, []).append(target)
    found.targets |= {key: _join(key, own, path) for key, own in targets.items()}
    return found


def split_captions(value: Any, where: str, *, parse_json: bool = False) -> list[str]:
    """The captions that a table cell or JSON field holds, stripped; "" stands for each blank or missing one.

    Raises ValueError that begins with `where` for anything but text and lists of text.
    """
    if parse_json and isinstance(parsed := from_json(value), list) and all(isinstance(item, str) for item in parsed):
        value = parsed
    if value is None or (isinstance(value, float) and value != value):
        return [""]
    items: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if item is not None and not isinstance(item, str):
            raise ValueError(f"{where} has a caption that is not text but {type(item).__name__} ({item!r})")
    return [(item or "").strip() for item in items] or [""]


def _join(key: str, targets: list[Target], path: str | Path) -> Target:
    """One target out of those that the rows of a sample name."""
    if all(target == targets[0] for target in targets):
        return targets[0]
    names = [target for target in targets if isinstance(target, str)]
    joined = shares(names) if len(names) == len(targets) else None
    if joined is None:
        raise ValueError(f"several rows of {str(path)!r} give {key!r} different answers; put them into one row")
    return joined


def _image_names(value: Any, where: str, parse_json: bool) -> list[str]:
    found = from_json(value) if parse_json else value
    names = found if isinstance(found, list) and found else [value]
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where} names no image")
    return [name.strip() for name in names]


def _image_key(written: str, root: Path, where: str) -> str:
    """The path of an image relative to the folder of images."""
    name = posixpath.normpath(written)
    if posixpath.isabs(name):
        name = name.removeprefix(root.absolute().as_posix().rstrip("/") + "/")
    if posixpath.isabs(name) or name == ".." or name.startswith("../"):
        raise ValueError(f"{where} names the image {written!r}, which is outside of the images folder {str(root)!r}")
    return name


# What the readers return: the columns, and (number of the line or row, its cells by column).
_Content = tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]


def _read_csv(path: Path) -> _Content:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows: list[tuple[int, dict[str, Any]]] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        columns = [name.strip() for name in next(reader, [])]
        for fields in filter(None, reader):
            if len(fields) != len(columns):
                raise ValueError(
                    f"line {reader.line_num} of {str(path)!r} has {len(fields)} fields where the header has "
                    f"{len(columns)}; put text that contains the separator in double quotes"
                )
            rows.append((reader.line_num, dict(zip(columns, fields, strict=True))))
    return columns, iter(rows)


def _read_jsonl(path: Path) -> _Content:
    columns: dict[str, None] = {}
    rows: list[tuple[int, dict[str, Any]]] = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} of {str(path)!r} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} of {str(path)!r} is not a JSON object but {type(row).__name__}")
            columns.update(dict.fromkeys(row))
            rows.append((number, row))
    return list(columns), iter(rows)


def _read_parquet(path: Path) -> _Content:
    """Reads only columns that could be a name, captions or labels: a table may carry pixels next to them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        wanted = [name for name, kind in zip(schema.names, schema.types, strict=True) if _is_text(kind)]
        batches = file.read(columns=wanted).to_batches(max_chunksize=8192)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read the table {str(path)!r}: {error}") from error
    return list(schema.names), enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return not (types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind))
