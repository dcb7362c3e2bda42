"""The files that a run writes: captions in one file (JSON lines, CSV, Parquet) or beside the images, and records."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from opencoca.data import SampleSource
from opencoca.recaption.captioner import Row
from opencoca.recaption.inputs import common_folder, text_files_beside
from opencoca.system.files import atomic_write, check_writable, clean_folder, partial_path, write_error

OUTPUT_SUFFIXES = (".jsonl", ".csv", ".parquet")
_ROWS_PER_GROUP = 16_384
_BESIDE_NAME = "opencoca-captions"


@dataclass(frozen=True)
class Destination:
    """The files that a run writes.

    out: a .jsonl, .csv or .parquet file for the captions, or None.
    base: the beginning of the names of the run's own files: BASE.journal, BASE.errors.jsonl, BASE.run.json.
    texts: the text file beside each image; empty if none are written.
    """

    out: Path | None
    base: Path
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: SampleSource, out: str | Path | None, beside: bool) -> Destination:
        """Plans the files; raises ValueError if images cannot have files beside them or `out` has an unknown suffix."""
        texts = tuple(text_files_beside(source)) if beside else ()
        if out is not None:
            check_suffix(out)
            return cls(Path(out), Path(out), texts)
        assert beside, "there is nowhere to write to"
        return cls(None, common_folder(source) / _BESIDE_NAME, texts)

    @property
    def journal(self) -> Path:
        return self.base.with_name(self.base.name + ".journal")

    @property
    def errors(self) -> Path:
        return self.base.with_name(self.base.name + ".errors.jsonl")

    @property
    def record(self) -> Path:
        return self.base.with_name(self.base.name + ".run.json")

    def check(self) -> None:
        """Raises ValueError if one of the files cannot be written; to be called before the work begins."""
        check_writable(self.out, self.journal, self.errors, self.record)

    def existing(self) -> list[str]:
        """Returns the existing files that the run would replace."""
        found = [str(self.out)] if self.out is not None and self.out.exists() else []
        return found + [path for path in self.texts if os.path.lexists(path)]


def check_suffix(path: str | Path) -> None:
    """Raises ValueError if the path's suffix belongs to no format of captions."""
    if Path(path).suffix.lower() not in OUTPUT_SUFFIXES:
        known = ", ".join(OUTPUT_SUFFIXES[:-1]) + f" or {OUTPUT_SUFFIXES[-1]}"
        raise ValueError(f"cannot tell the format of {str(path)!r}: its name must end in {known}")


def write_rows(path: str | Path, rows: Iterable[Row], columns: tuple[str, ...]) -> None:
    """Writes rows in their order, in the format of the path's suffix; the file appears whole or not at all.

    Every row has these columns; `flags` is a list of words, in CSV joined by spaces. The same rows give the same bytes.

    Raises WriteError if the file cannot be written; an older one then stays as it was.
    """
    check_suffix(path)
    writer = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}[Path(path).suffix.lower()]
    with atomic_write(path) as partial:
        writer(partial, rows, columns)


def _write_jsonl(path: Path, rows: Iterable[Row], columns: tuple[str, ...]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n")


def _write_csv(path: Path, rows: Iterable[Row], columns: tuple[str, ...]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        # All texts are quoted: the writer would not quote a lone carriage return.
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([" ".join(row[name]) if name == "flags" else row[name] for name in columns])


def _write_parquet(path: Path, rows: Iterable[Row], columns: tuple[str, ...]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"rank": pa.int32(), "length": pa.int32(), "flags": pa.list_(pa.string())}
    texts = ("image", "caption")
    schema = pa.schema([(name, pa.string() if name in texts else kinds.get(name, pa.float64())) for name in columns])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        remaining = iter(rows)
        while group := list(islice(remaining, _ROWS_PER_GROUP)):
            clean = [{name: _as_utf8(row[name]) for name in columns} for row in group]
            writer.write_table(pa.Table.from_pylist(clean, schema))


def _as_utf8(value: Any) -> Any:
    """Makes a file's name writable as UTF-8; it may have bytes that belong to no encoding."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def write_texts(texts: Iterable[tuple[str, str]]) -> None:
    """Writes text files, given as (path, content); each appears whole, and all are on disk when this returns.

    Raises WriteError about the first that cannot be written, when all others are.
    """
    failed: OSError | None = None
    for path, content in texts:
        partial = partial_path(Path(path))
        try:
            clean_folder(os.path.dirname(path))
            try:
                with open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                    file.write(content)
                os.replace(partial, path)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
        except OSError as error:
            failed = failed or write_error(path, error)
    if hasattr(os, "sync"):
        os.sync()  # once for all: flushing very many small files would take longer than captioning
    if failed:
        raise failed
