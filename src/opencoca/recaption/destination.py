"""The files that a run writes: its captions, and its own records."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from opencoca.data import SampleSource
from opencoca.recaption.inputs import common_folder, text_files_beside
from opencoca.recaption.outputs import check_suffix

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

    def existing(self) -> list[str]:
        """Returns the existing files that the run would replace."""
        found = [str(self.out)] if self.out is not None and self.out.exists() else []
        return found + [path for path in self.texts if os.path.lexists(path)]
