"""Ends a run: makes the output files from its journal, in the order of the images."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from opencoca.recaption.destination import Destination
from opencoca.recaption.flags import ALL_FLAGS, COMMON, CommonCaptions, FlagThresholds, caption_flags
from opencoca.recaption.journal import Journal
from opencoca.recaption.outputs import write_rows, write_texts
from opencoca.recaption.rows import Row, output_rows
from opencoca.recaption.settings import Settings
from opencoca.system.files import remove_partial_files, write_json


@dataclass(frozen=True)
class RunReport:
    """The numbers of images, captions and unreadable images of a run, and of captions with each flag."""

    images: int
    captions: int
    unreadable: int
    flags: dict[str, int]


def make_files(
    journal: Journal, destination: Destination, settings: Settings, prefix: str, thresholds: FlagThresholds
) -> RunReport:
    """Writes all files of a run. The same journal gives the same bytes, however often this is repeated.

    Raises WriteError if a file cannot be written; the journal is untouched.
    """
    for path in filter(None, (destination.out, destination.errors, destination.record)):
        remove_partial_files(path)
    common = CommonCaptions(thresholds)
    for row in journal.rows():
        if "error" not in row:
            common.add(caption["caption"] for caption in row["captions"])
    if destination.out is not None:
        write_rows(destination.out, _flagged_rows(journal, prefix, common), _columns(journal))
    if destination.texts:
        rows = zip(destination.texts, journal.rows(), strict=True)
        write_texts((path, _text_file(row)) for path, row in rows if "error" not in row)
    report = _report(journal, _flagged_rows(journal, prefix, common))
    _write_errors(destination.errors, journal.rows(), report.unreadable)
    write_json(destination.record, {"settings": settings, "report": asdict(report)})
    return report


def finished_report(destination: Destination, settings: Settings) -> RunReport | None:
    """Returns the report of a finished run with these settings, if its record can be read and its files exist."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(destination.record.read_text(encoding="utf-8"))
        report = RunReport(**content["report"])
        if content["settings"] == settings and (destination.out is None or destination.out.exists()):
            return report
    return None


def _flagged_rows(journal: Journal, prefix: str, common: CommonCaptions) -> Iterator[Row]:
    """Yields the rows of the output, with flags."""
    for image in journal.rows():
        for row in output_rows(image):
            flags = caption_flags(row["caption"], prefix, common.thresholds)
            if common.is_common(row["caption"]):
                flags += (COMMON,)
            yield {**row, "flags": list(flags)}


def _columns(journal: Journal) -> tuple[str, ...]:
    """Returns the names of the fields, which are the same in every row of a run."""
    first = next((row for image in journal.rows() for row in output_rows(image)), None)
    return (*(first or ("image", "caption", "log_probability", "length")), "flags")


def _text_file(row: Row) -> str:
    """Returns the content of a text file: one caption on each line."""
    return "".join(" ".join(caption["caption"].split()) + "\n" for caption in row["captions"])


def _report(journal: Journal, rows: Iterable[Row]) -> RunReport:
    unreadable = sum("error" in row for row in journal.rows())
    flags: Counter[str] = Counter()
    captions = 0
    for row in rows:
        captions += 1
        flags.update(row["flags"])
    return RunReport(journal.num_done, captions, unreadable, {name: flags[name] for name in ALL_FLAGS})


def _write_errors(path: Path, rows: Iterable[Row], count: int) -> None:
    if not count:
        path.unlink(missing_ok=True)  # of an earlier run that was overwritten
        return
    errors = ({"image": row["image"], "error": row["error"]} for row in rows if "error" in row)
    write_rows(path, errors, ("image", "error"))
