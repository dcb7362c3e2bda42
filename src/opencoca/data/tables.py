"""Tables: CSV, TSV, JSON lines and Parquet files whose rows name an image and its captions, its label, or both."""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from opencoca.data.targets import Target, from_json, parse_target, shares

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


class TableColumns(NamedTuple):
    """What the columns of a table are called; None for one that isn't read.

    Where a table has no `image`, `caption` or `label` but `images`, `captions` or `labels`, that is read.
    """

    image: str = "image"
    caption: str | None = "caption"
    label: str | None = None


DEFAULT_COLUMNS = TableColumns()


@dataclass(frozen=True)
class SampleTable:
    """What a table says of its samples, by key; `captions` has all of them, in the order of their first row.

    Attributes:
        captions: all captions of a sample, blank ones left out.
        targets: of the samples that have one.
        images: the names of the images, of the samples that have several.
        blank: the key of a sample once per blank caption.
    """

    captions: dict[str, tuple[str, ...]]
    targets: dict[str, Target]
    images: dict[str, tuple[str, ...]]
    blank: tuple[str, ...]


def read_table(
    path: str | Path, columns: TableColumns = DEFAULT_COLUMNS, *, images_root: str | Path = "."
) -> SampleTable:
    """Read a table whose rows hold an image's name with one caption or a list of captions, with a label, or with both.

    A list is a list in JSON lines and Parquet, and a JSON array in CSV. A row of several images is a sample of several,
    and its key is their names with ` + ` between them. Rows of the same images are joined in order of appearance, their
    labels as `parse_target` has it of a list. Image names are relative to `images_root`, with `/` between folders;
    absolute ones within it are made relative.

    Raises:
        FileNotFoundError: no such table.
        ValueError: unreadable, of an unknown format, without the columns, or with a row that names no image, an image
            outside of `images_root`, a caption that isn't text, or a label that can't be used.
    """
    path, root = Path(path), Path(images_root)
    names, rows = _read_rows(path)
    image, caption, label = (column and _own_name(names, column) for column in columns)
    assert image
    _check_columns(path, names, (image, caption, label))
    parse_json = path.suffix.lower() in (".csv", ".tsv")
    captions: dict[str, list[str]] = {}
    targets: dict[str, list[Target]] = {}
    several: dict[str, tuple[str, ...]] = {}
    blank: list[str] = []
    classes: dict[str, str] = {}  # one string for each class, however many samples it has
    for row_name, row in rows:
        where = f"{row_name} of {str(path)!r}"
        own_images = _image_keys(row.get(image), root, where, parse_json)
        key = " + ".join(own_images)
        if len(own_images) > 1:
            several[key] = own_images
        own = captions.setdefault(key, [])
        for text in split_captions(row.get(caption), where, parse_json=parse_json) if caption else ():
            if text:
                own.append(text)
            else:
                blank.append(key)
        target = parse_target(row.get(label), where, parse_json=parse_json) if label else None
        if isinstance(target, str):
            target = classes.setdefault(target, target)
        if target is not None:
            targets.setdefault(key, []).append(target)
    joined = {key: _join(key, own, path) for key, own in targets.items()}
    return SampleTable({key: tuple(texts) for key, texts in captions.items()}, joined, several, tuple(blank))


def read_captions(path: str | Path, *, caption_column: str = "caption") -> list[str]:
    """All captions of a table, in its order, blank ones left out; no column of images is needed.

    Raises as `read_table` does.
    """
    path = Path(path)
    columns, rows = _read_rows(path)
    caption_column = _own_name(columns, caption_column)
    _check_columns(path, columns, (caption_column,))
    parse_json = path.suffix.lower() in (".csv", ".tsv")
    own = (split_captions(r.get(caption_column), f"{w} of {str(path)!r}", parse_json=parse_json) for w, r in rows)
    return [text for texts in own for text in texts if text]


def read_image_names(path: str | Path, *, image_column: str = "image") -> list[str]:
    """The images that a table names, as they are written there, each once, in the order of their first row.

    Raises as `read_table` does.
    """
    path = Path(path)
    columns, rows = _read_rows(path)
    _check_columns(path, columns, (image_column,))
    names: dict[str, None] = {}
    for where, row in rows:
        names[_image_name(row.get(image_column), f"{where} of {str(path)!r}")] = None
    return list(names)


def column_names(path: str | Path) -> list[str]:
    """What the columns of a table are called. Raises as `read_table` does."""
    return _read_rows(Path(path))[0]


def _read_rows(path: Path) -> _Rows:
    if not path.is_file():
        raise FileNotFoundError(f"there is no table {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"cannot tell the format of the table {str(path)!r}: expected {_any(TABLE_SUFFIXES)}")
    try:
        return _READERS[suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the table {str(path)!r}: it is not UTF-8 text ({error})") from error
    except (csv.Error, OSError) as error:
        raise ValueError(f"cannot read the table {str(path)!r}: {error}") from error


def _own_name(columns: list[str], wanted: str) -> str:
    """What a table calls a column: in the plural if that is what it has, and the name was left at its default."""
    plural = wanted in TableColumns(label="label") and wanted not in columns and f"{wanted}s" in columns
    return f"{wanted}s" if plural else wanted


def _check_columns(path: Path, columns: list[str], wanted: tuple[str | None, ...]) -> None:
    for column in wanted:
        if column and column not in columns:
            have = ", ".join(repr(name) for name in columns) or "none"
            raise ValueError(f"the table {str(path)!r} has no column {column!r}; its columns are: {have}")


def _join(key: str, targets: list[Target], path: Path) -> Target:
    """One target out of those that the rows of a sample name."""
    if all(target == targets[0] for target in targets):
        return targets[0]
    names = [target for target in targets if isinstance(target, str)]
    joined = shares(names) if len(names) == len(targets) else None
    if joined is None:
        raise ValueError(f"several rows of {str(path)!r} give {key!r} different answers; put them into one row")
    return joined


def split_captions(value: Any, where: str, *, parse_json: bool = False) -> list[str]:
    """The captions that a table cell or JSON field holds, stripped; "" stands for each blank or missing one.

    Raises ValueError that begins with `where` for anything but text and lists of text.
    """
    if value is None or (isinstance(value, float) and value != value):
        return [""]
    if isinstance(value, str):
        text = value.strip()
        if parse_json and text.startswith("[") and text.endswith("]"):
            try:
                parsed = json.loads(text)
            except ValueError:
                return [text]
            if isinstance(parsed, list) and all(isinstance(item, str) for item in parsed):
                return [item.strip() for item in parsed] or [""]
        return [text]
    if isinstance(value, list | tuple):
        if all(item is None or isinstance(item, str) for item in value):
            return [(item or "").strip() for item in value] or [""]
        value = next(item for item in value if item is not None and not isinstance(item, str))
    raise ValueError(f"{where} has a caption that is not text but {type(value).__name__} ({value!r})")


def _image_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} names no image")
    return value.strip()


def _image_keys(value: Any, root: Path, where: str, parse_json: bool) -> tuple[str, ...]:
    found = from_json(value) if parse_json else value
    values = found if isinstance(found, list) and found else [value]
    return tuple(_image_key(name, root, where) for name in values)


def _image_key(value: Any, root: Path, where: str) -> str:
    name = _image_name(value, where)
    if posixpath.isabs(name):
        absolute_root = root.absolute().as_posix().rstrip("/") + "/"
        name = posixpath.normpath(name)
        if not name.startswith(absolute_root):
            raise ValueError(f"{where} names the image {value!r}, which is outside of the images folder {str(root)!r}")
        return name.removeprefix(absolute_root)
    name = posixpath.normpath(name)
    if name == ".." or name.startswith("../"):
        raise ValueError(f"{where} names the image {value!r}, which is outside of the images folder {str(root)!r}")
    return name


def _any(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]


# A reader returns the columns and an iterator over (where the row is, the row).
_Rows = tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]


def _read_csv(path: Path) -> _Rows:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        columns = [name.strip() for name in next(reader, [])]
        rows: list[tuple[str, dict[str, Any]]] = []
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(columns):
                raise ValueError(
                    f"line {reader.line_num} of {str(path)!r} has {len(fields)} fields where the header has "
                    f"{len(columns)}; put text that contains the separator in double quotes"
                )
            rows.append((f"line {reader.line_num}", dict(zip(columns, fields, strict=True))))
    return columns, iter(rows)


def _read_jsonl(path: Path) -> _Rows:
    columns: dict[str, None] = {}
    rows: list[tuple[str, dict[str, Any]]] = []
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
            rows.append((f"line {number}", row))
    return list(columns), iter(rows)


def _read_parquet(path: Path) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns = list(file.schema_arrow.names)
        wanted = [name for name, kind in zip(columns, file.schema_arrow.types, strict=True) if _is_text(kind)]
        table = file.read(columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read the table {str(path)!r}: {error}") from error
    rows = ((f"row {number}", row) for number, row in enumerate(_parquet_rows(table), 1))
    return columns, rows


def _is_text(kind: Any) -> bool:
    """Only columns that could be a name, captions or labels are read; a table may carry pixels next to them."""
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return not (types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind))


def _parquet_rows(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=8192):
        yield from batch.to_pylist()


_READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
