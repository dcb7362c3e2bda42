"""Reads tables that are text: CSV and TSV files, JSON lines, and JSON files of rows or of COCO's annotations."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from opencoca.data.cells import holds_image
from opencoca.system.messages import brief, shown
from opencoca.system.reading import decoded

_SEPARATORS = (",", "\t", ";", "|")
_MAX_FIELD = 1 << 30
_MAX_HEADER = 1 << 20

Row = tuple[str, dict[str, Any]]
"""The place of a row in its file, such as `line 3`, and its cells by column."""


class TextRows:
    """The columns and rows of a table that is text, all of them in memory.

    Args:
        path: the file; its suffix tells the format.
        split: of annotations with splits, the ones to read, joined by `+`; "" for all.

    Raises ValueError for a file that can't be read.
    """

    def __init__(self, path: Path, split: str = ""):
        suffix, encoding = path.suffix.lower(), _encoding(path)
        try:
            if suffix in (".csv", ".tsv"):
                self.columns, self._rows = _read_csv(path, encoding)
            elif suffix == ".json":
                self.columns, self._rows = _read_json(path, encoding, split)
            else:
                self.columns, self._rows = _read_jsonl(path, encoding)
        except UnicodeError as error:
            raise ValueError(f"cannot read the table {_name(path)}: {_why_no_text(path, encoding)}") from error
        except MemoryError as error:
            raise ValueError(f"cannot read the table {_name(path)}: there is not enough memory") from error

    def rows(self, wanted: Sequence[str]) -> Iterator[Row]:
        return iter(self._rows)

    def holds_images(self, column: str) -> bool:
        """Tells whether the first cell of a column that isn't blank is an image and not the name of one."""
        first = next((cells[column] for _, cells in self._rows if cells.get(column)), None)
        return holds_image(first)

    def cells(self, column: str) -> Sequence[Any]:
        return [cells.get(column) for _, cells in self._rows]


def _encoding(path: Path) -> str:
    """The encoding that a file begins like: UTF-16 or UTF-32 as spreadsheets export it, or UTF-8."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if len(head) == 4 and 0 in head and (head[1] == head[3] == 0 or head[0] == head[2] == 0):
        return "utf-16-le" if head[1] == 0 else "utf-16-be"
    return "utf-8-sig"


def _why_no_text(path: Path, encoding: str) -> str:
    if encoding == "utf-8-sig":
        try:
            decoded(path.read_bytes())
        except ValueError as error:
            return str(error)
    return f"it begins as {encoding[:6].upper()} and goes on as no text; save it as UTF-8"


def _read_csv(path: Path, encoding: str) -> tuple[list[str], list[Row]]:
    with open(path, encoding=encoding, newline="") as file:
        first = file.readline(_MAX_HEADER)
        declared = first.strip().lower()
        skipped = len(declared) == 5 and declared.startswith("sep=")  # a line that Excel writes and reads
        separator = declared[4] if skipped else _separator(first, "\t" if path.suffix.lower() == ".tsv" else ",")
        header_at, limit = (2 if skipped else 1), csv.field_size_limit(_MAX_FIELD)
        try:
            file.seek(0)
            return _with_header(path, _quoted(path, file, separator, header_at))
        except _QuoteError as error:
            if separator != "\t":
                raise ValueError(
                    f"the row at line {error.line} of {_name(path)} has a quotation mark that is not closed or stands "
                    'within text; put the whole field into quotes and write "" for each mark in it'
                ) from error
            file.seek(0)  # in tab-separated tables, marks are often meant as they stand
            return _with_header(path, _as_they_stand(file, header_at))
        finally:
            csv.field_size_limit(limit)


def _separator(header: str, usual: str) -> str:
    """The separator by which a header has the most fields; the usual one if others have no more."""
    return max((usual, *_SEPARATORS), key=header.count)


class _QuoteError(Exception):
    """Quotation marks that make no sense in the row that begins on this line."""

    def __init__(self, line: int):
        super().__init__(line)
        self.line = line


_Fields = Iterable[tuple[int, list[str]]]


def _quoted(path: Path, file: Iterable[str], separator: str, header_at: int) -> _Fields:
    """The fields of each row, with the line on which it begins."""
    reader = csv.reader(file, delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _QuoteError(line) from error
        if separator == "\t" and any("\n" in field and "\t" in field for field in fields):
            raise _QuoteError(line)  # a mark that was never closed has swallowed other rows
        if line >= header_at:
            yield line, fields


def _as_they_stand(file: Iterable[str], header_at: int) -> _Fields:
    for number, line in enumerate(file, 1):
        if number >= header_at:
            yield number, [_unquoted(field) for field in line.rstrip("\r\n").split("\t")]


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else field


def _with_header(path: Path, rows: _Fields) -> tuple[list[str], list[Row]]:
    columns: list[str] | None = None
    found: list[Row] = []
    for line, fields in rows:
        if len(fields) <= 1 and not "".join(fields).strip():
            continue
        if columns is None:
            columns = [name.strip() for name in fields]
        elif len(fields) != len(columns):
            raise ValueError(
                f"line {line} of {_name(path)} has {len(fields)} fields where the header has {len(columns)}; put text "
                "that contains the separator in double quotes"
            )
        else:
            found.append((f"line {line}", dict(zip(columns, fields, strict=True))))
    return columns or [], found


def _read_jsonl(path: Path, encoding: str) -> tuple[list[str], list[Row]]:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    with open(path, encoding=encoding) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _parse(line, path, number)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} of {_name(path)} is not a JSON object but {type(row).__name__}")
            columns.update(dict.fromkeys(row))
            rows.append((f"line {number}", row))
    return list(columns), rows


class _DoubledKey(Exception):
    """The `number`-th object that a JSON text ends has a key twice."""

    def __init__(self, key: str, number: int):
        super().__init__(key, number)
        self.key, self.number = key, number


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a JSON text, which is the whole file or one of its lines. Raises ValueError."""
    where = f"line {line} of {_name(path)}" if line else _name(path)
    ended = 0

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal ended
        ended += 1
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise _DoubledKey(next(key for key in keys if keys.count(key) > 1), ended)
        return found

    try:
        return json.loads(text, object_pairs_hook=as_dict)
    except _DoubledKey as error:
        place = f"line {line or _end_line(text, error.number)} of {_name(path)}"
        raise ValueError(
            f"{place} has an object with the key {shown(error.key)} twice; rename or remove one of them"
        ) from None
    except RecursionError:
        raise ValueError(f"{where} is JSON that is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {brief(error)}") from error


def _end_line(text: str, number: int) -> int:
    """The line on which the `number`-th object of a JSON text ends, counted from 1."""
    ends = (mark for mark in re.finditer(r'"(?:[^"\\]|\\.)*"|}', text, re.DOTALL) if mark[0] == "}")
    return 1 + text.count("\n", 0, next(islice(ends, number - 1, None)).start())


def _read_json(path: Path, encoding: str, split: str) -> tuple[list[str], list[Row]]:
    with open(path, encoding=encoding) as file:
        first = file.readline()
        if _is_object(first) and any(line.strip() for line in file):  # JSON lines under another name
            return _read_jsonl(path, encoding)
        file.seek(0)
        content = _parse(file.read(), path)
    try:
        rows = _annotated(content, split)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cannot read the table {_name(path)}: it is neither a list of objects nor annotations as COCO or Karpathy "
            f"write them ({type(error).__name__}: {brief(error, 60)})"
        ) from error
    columns = dict.fromkeys(name for row in rows for name in row)
    return list(columns), [(f"entry {number}", row) for number, row in enumerate(rows, 1)]


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _annotated(content: Any, split: str) -> list[dict[str, Any]]:
    """The rows of a JSON file. Raises KeyError, TypeError, AttributeError or ValueError for one of another form."""
    if isinstance(content, list):
        rows = [dict(row.items()) for row in content]
        return [row for row in rows if not split or row["split"] in split.split("+")]
    images = content["images"]
    if any("sentences" in image for image in images):
        return [_karpathy_row(image) for image in images if not split or image["split"] in split.split("+")]
    if split:
        raise ValueError("it has no splits")
    names = {image["id"]: image["file_name"] for image in images}
    classes = {kind["id"]: kind["name"] for kind in content.get("categories") or ()}
    rows: list[dict[str, Any]] = []
    for annotation in content.get("annotations") or ():
        row = {"image": names[annotation["image_id"]]}
        if "caption" in annotation:
            row["caption"] = annotation["caption"]
        if annotation.get("category_id") in classes:
            row["label"] = classes[annotation["category_id"]]
        rows.append(row)
    return rows or [{"image": name} for name in names.values()]


def _karpathy_row(image: dict[str, Any]) -> dict[str, Any]:
    folder = image.get("filepath")
    name = f"{folder}/{image['filename']}" if folder else image["filename"]
    return {"image": name, "captions": [sentence["raw"] for sentence in image["sentences"]], "split": image["split"]}


def _name(path: Path) -> str:
    return shown(str(path), 100)
