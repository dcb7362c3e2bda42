"""Caption tables: CSV, TSV, JSON lines and Parquet files that name an image and its captions in each row."""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class CaptionTable:
    """Captions by image, images in the order of their first row; `blank` names an image once per blank caption."""

    captions: dict[str, tuple[str, ...]]
    blank: tuple[str, ...]


def read_caption_table(
    path: str | Path, *, image_column: str = "image", caption_column: str = "caption", images_root: str | Path = "."
) -> CaptionTable:
    """Read a table whose rows hold an image's name and one caption or a list of captions.

    A list is a list in JSON lines and Parquet, and a JSON array of strings in CSV. Where the column `caption` was left
    at its default and doesn't exist, `captions` is used. Rows of one image are joined in order of appearance. Image
    names are relative to `images_root`, with `/` between folders; absolute ones within it are made relative.

    Raises:
        FileNotFoundError: no such table.
        ValueError: unreadable, of an unknown format, without the columns, or with a row that names no image, an image
            outside of `images_root`, or a caption that isn't text.
    """
    path = Path(path)
    columns, rows = _read_rows(path)
    if caption_column == "caption" and "caption" not in columns and "captions" in columns:
        caption_column = "captions"
    _check_columns(path, columns, (image_column, caption_column))

    collected: dict[str, list[str]] = {}
    blank: list[str] = []
    for where, row in rows:
        key = _image_key(row.get(image_column), Path(images_root), f"{where} of {str(path)!r}")
        texts = split_captions(
            row.get(caption_column), f"{where} of {str(path)!r}", parse_json=path.suffix.lower() in (".csv", ".tsv")
        )
        own = collected.setdefault(key, [])
        for text in texts:
            if text:
                own.append(text)
            else:
                blank.append(key)
    return CaptionTable({key: tuple(texts) for key, texts in collected.items()}, tuple(blank))


def read_captions(path: str | Path, *, caption_column: str = "caption") -> list[str]:
    """All captions of a table, in its order, blank ones left out; no column of images is needed.

    Raises as `read_caption_table` does.
    """
    path = Path(path)
    columns, rows = _read_rows(path)
    if caption_column == "caption" and "caption" not in columns and "captions" in columns:
        caption_column = "captions"
    _check_columns(path, columns, (caption_column,))
    parse_json = path.suffix.lower() in (".csv", ".tsv")
    own = (split_captions(r.get(caption_column), f"{w} of {str(path)!r}", parse_json=parse_json) for w, r in rows)
    return [text for texts in own for text in texts if text]


def read_image_names(path: str | Path, *, image_column: str = "image") -> list[str]:
    """The images that a table names, as they are written there, each once, in the order of their first row.

    Raises as `read_caption_table` does.
    """
    path = Path(path)
    columns, rows = _read_rows(path)
    _check_columns(path, columns, (image_column,))
    names: dict[str, None] = {}
    for where, row in rows:
        names[_image_name(row.get(image_column), f"{where} of {str(path)!r}")] = None
    return list(names)


def _read_rows(path: Path) -> _Rows:
    if not path.is_file():
        raise FileNotFoundError(f"there is no caption table {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"cannot tell the format of the caption table {str(path)!r}: expected {_any(TABLE_SUFFIXES)}")
    try:
        return _READERS[suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the caption table {str(path)!r}: it is not UTF-8 text ({error})") from error
    except (csv.Error, OSError) as error:
        raise ValueError(f"cannot read the caption table {str(path)!r}: {error}") from error


def _check_columns(path: Path, columns: list[str], wanted: tuple[str, ...]) -> None:
    for column in wanted:
        if column not in columns:
            have = ", ".join(repr(name) for name in columns) or "none"
            raise ValueError(f"the caption table {str(path)!r} has no column {column!r}; its columns are: {have}")


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
                    f"{len(columns)}; put captions that contain the separator in double quotes"
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
        raise ValueError(f"cannot read the caption table {str(path)!r}: {error}") from error
    rows = ((f"row {number}", row) for number, row in enumerate(_parquet_rows(table), 1))
    return columns, rows


def _is_text(kind: Any) -> bool:
    """Only columns that could be a name or captions are read; a table may carry pixels next to them."""
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
