"""Captions the images of a source into files, in a run that survives kills.

Results go into a journal first (`OUT.journal`), batch by batch; when all images are done, the files are made from it.
So no finished batch is done again after a kill, and the files of a killed run equal those of an undisturbed one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from tqdm import tqdm

from opencoca.data import SampleSource
from opencoca.recaption.captioner import Captioner, caption_source
from opencoca.recaption.destination import Destination
from opencoca.recaption.finish import RunReport, finished_report, make_files
from opencoca.recaption.flags import FlagThresholds
from opencoca.recaption.journal import Journal
from opencoca.recaption.memory import choose_batch_size
from opencoca.recaption.rows import to_journal_row
from opencoca.recaption.settings import describe_changes, run_settings


def _silent(_: str) -> None:
    """Ignores what it is told."""


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
    on_error: Callable[[str], None] = _silent,
    on_note: Callable[[str], None] = _silent,
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

    Raises:
        ValueError: the files exist, belong to a run with other settings, or are in use by another process.
        WriteError: a file cannot be written; what was done so far is kept.
    """
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
