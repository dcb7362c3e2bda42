"""The list of samples that can't be used, one JSON object on each line, and the limit at which a run stops."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from opencoca.data.source import BadSample, SampleSource
from opencoca.system.notice import Notice

MAX_BAD_SHARE = 0.1
"""The default share of the samples read that may be bad before a run stops."""

# Only after this many samples is a share of bad ones taken seriously (or after all, if there are fewer).
_MIN_SAMPLES_TO_JUDGE = 100
_MAX_WARNINGS = 20
_REASONS_SHOWN = 3


class Quarantine:
    """Collects bad samples, lists them in a file, and raises ValueError once they are too many.

    Args:
        num_samples: of the source.
        path: JSON-lines file that each bad sample is appended to, once, also over several runs; None for no file.
        max_share: of the samples read so far that may be bad.
    """

    def __init__(self, num_samples: int, path: Path | None = None, max_share: float = MAX_BAD_SHARE):
        if not 0 <= max_share <= 1:
            raise ValueError(f"the largest share of bad samples must be in 0..1, got {max_share}")
        self.num_samples, self.path, self.max_share = num_samples, path, max_share
        self.by_index: dict[int, BadSample] = {}
        """Bad samples met while reading."""
        self._written = {(bad.file, bad.offset, bad.key) for bad in read_quarantine(path)} if path else set()

    def note_lost(self, source: SampleSource, *, write: bool = True) -> None:
        """Note what the source's files have lost already. Raises ValueError if that is too much."""
        if write:
            self._write(source.lost)
        named = [sample for sample in source.lost if sample.key]  # how many samples a damage took is unknown
        if len(named) > self.max_share * (self.num_samples + len(named)):
            self._stop(named, self.num_samples + len(named))

    def add(self, found: Mapping[int, BadSample]) -> None:
        """Note samples met while reading, by index, and warn of those that are new."""
        new = {index: bad for index, bad in found.items() if index not in self.by_index}
        for index, bad in new.items():
            self._warn(bad)
            self.by_index[index] = bad
        self._write(new.values())

    def check(self, num_read: int) -> None:
        """Raise ValueError if too many of the `num_read` samples so far, repetitions included, were bad."""
        seen = min(num_read, self.num_samples)
        enough = seen >= min(_MIN_SAMPLES_TO_JUDGE, self.num_samples)
        if enough and len(self.by_index) > self.max_share * seen:
            self._stop(list(self.by_index.values()), seen)

    def _warn(self, bad: BadSample) -> None:
        if len(self.by_index) < _MAX_WARNINGS:
            warnings.warn(f"{bad.reason}; another image takes its place", Notice, stacklevel=5)
        elif len(self.by_index) == _MAX_WARNINGS:
            where = f"; {str(self.path)!r} lists them all" if self.path else ""
            warnings.warn(f"more than {_MAX_WARNINGS} images are bad{where}", Notice, stacklevel=5)

    def _stop(self, bad: list[BadSample], seen: int) -> None:
        first = "; ".join(sample.reason for sample in bad[:_REASONS_SHOWN])
        where = f"all are listed in {str(self.path)!r}" if self.path else "find them with `opencoca data check`"
        raise ValueError(
            f"{len(bad)} images are broken, more than {self.max_share:.0%} of the {seen} read so far ({first}); "
            f"{where}: repair or remove them"
        )

    def _write(self, samples: Iterable[BadSample]) -> None:
        new = [bad for bad in samples if (bad.file, bad.offset, bad.key) not in self._written]
        if self.path is None or not new:
            return
        self._written |= {(bad.file, bad.offset, bad.key) for bad in new}
        lines = "".join(json.dumps(bad._asdict(), ensure_ascii=False) + "\n" for bad in new)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write at the end of the file: lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, lines.encode("utf-8", "backslashreplace"))
        finally:
            os.close(descriptor)


def read_quarantine(path: str | Path) -> list[BadSample]:
    """The bad samples that a run has listed, each once; a line that a crash cut short is left out."""
    found: dict[BadSample, None] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            found[BadSample(**json.loads(line))] = None
        except (ValueError, TypeError):
            continue
    return list(found)
