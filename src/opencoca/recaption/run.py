"""Captions the images of a source into files, in a run that survives kills.

Results go into a journal first (`OUT.journal`), batch by batch; when all images are done, the files are made from it.
So no finished batch is done again after a kill, and the files of a killed run equal those of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from opencoca.data import SampleSource
from opencoca.recaption.captioner import Captioner, Row, caption_source, output_rows, to_journal_row
from opencoca.recaption.flags import ALL_FLAGS, COMMON, CommonCaptions, FlagThresholds, caption_flags
from opencoca.recaption.journal import Journal
from opencoca.recaption.memory import choose_batch_size
from opencoca.recaption.outputs import Destination, write_rows, write_texts
from opencoca.recaption.settings import Settings, describe_changes, run_settings
from opencoca.system.files import write_json


@dataclass(frozen=True)
class RunReport:
    """The numbers of images, captions and unreadable images of a run, and of captions with each flag."""

    images: int
    captions: int
    unreadable: int
    flags: dict[str, int]


def caption_to_files(
    captioner: Captioner,
    source: SampleSource,
    destination: Destination,
    *,
    batch_size: int | None = None,
    memory_bytes: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
    thresholds: FlagThresholds | None = None,
    on_error: Callable[[str], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
    on_batch_size: Callable[[int], None] = lambda _: None,
) -> RunReport:
    """Captions all images of a source into files; started again after a kill, it continues.

    Args:
        source: the images; their names must be unique.
        batch_size: images at a time; None for that of the journal, or for as many as fit into memory_bytes.
        memory_bytes: memory for a batch; None for half of the free memory.
        overwrite: whether to start over and replace what an earlier run wrote.
        thresholds: the limits from which on captions are flagged.
        on_error: called with a sentence for each image that cannot be read.
        on_note: called with other news for the user: that the run continues, or was complete already.
        on_batch_size: called with the number of images at a time, when it is known.

    Raises:
        ValueError: the files exist, belong to a run with other settings, or are in use by another process.
        WriteError: a file cannot be written; what was done so far is kept.
    """
    destination.check()
    thresholds = thresholds or FlagThresholds()
    settings = run_settings(captioner, source, thresholds, beside=bool(destination.texts))
    if not overwrite and not destination.journal.exists():
        if (report := finished_report(destination, settings)) is not None:
            on_note(f"{destination.base} is complete already: {report.images:,} images")
            return report
        if existing := destination.existing():
            more = f" and {len(existing) - 1:,} other files" if len(existing) > 1 else ""
            raise ValueError(
                f"{existing[0]}{more} would be replaced; choose another name, or replace it with --overwrite"
            )
    with Journal(destination.journal, settings, overwrite=overwrite) as journal:
        if changes := describe_changes(journal.header, settings):
            raise ValueError(
                f"{journal.path} belongs to a run with other settings: {changes}; continue with the old settings, or "
                "start over with --overwrite"
            )
        if journal.num_done:
            on_note(f"continuing after {journal.num_done:,} of {len(source):,} images in {journal.path}")
        if journal.num_done < len(source):
            size = batch_size or (None if memory_bytes else journal.last_batch_size)
            size = size or choose_batch_size(captioner, len(source), memory_bytes)
            on_batch_size(size)
            _work(captioner, source, journal, size, progress, on_error)
        report = make_files(journal, destination, settings, captioner.options.prefix, thresholds)
        journal.remove()
    return report


def _work(
    captioner: Captioner,
    source: SampleSource,
    journal: Journal,
    batch_size: int,
    progress: bool,
    on_error: Callable[[str], None],
) -> None:
    done = journal.num_done
    batches = caption_source(captioner, source, batch_size, start=done)
    with (
        contextlib.closing(batches),
        tqdm(total=len(source), initial=done, desc="captioning", unit="image", disable=not progress) as bar,
    ):
        try:
            for batch in batches:
                for image in batch:
                    if image.error is not None:
                        on_error(image.error)
                journal.append([to_journal_row(image) for image in batch], batch_size)
                bar.update(len(batch))
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{batch_size} images at a time do not fit into the memory of {captioner.device}; the same command "
                f"with --batch-size {max(1, batch_size // 2)} continues from image {journal.num_done:,}"
            ) from error


def make_files(
    journal: Journal, destination: Destination, settings: Settings, prefix: str, thresholds: FlagThresholds
) -> RunReport:
    """Writes all files of a run. The same journal gives the same bytes, however often this is repeated.

    Raises WriteError if a file cannot be written; the journal is untouched.
    """
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
    roots = [os.getcwd(), os.path.relpath(os.getcwd(), os.path.realpath(destination.record.parent))]
    write_json(destination.record, {"settings": settings, "report": asdict(report), "roots": roots})
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
