"""A run's folder of checkpoints: what stands in it, how one more appears, and which of them stay.

A checkpoint is a folder, step-STEP or, if there is one of this step, step-STEP.NUMBER. It is made under another name,
completed, brought to the disk, and renamed; nothing in it changes from then on. The file ``latest`` then names it.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from opencoca.system.files import atomic_write, flush_to_disk
from opencoca.train.checkpoints.index import INDEX_NAME
from opencoca.train.recipe.safety import CheckpointRecipe

_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")
_PARTIAL = ".partial"


class CheckpointName(NamedTuple):
    """A checkpoint's name. Names sort as they were made, unless the run went back to an earlier checkpoint."""

    step: int
    number: int = 0

    def __str__(self) -> str:
        return f"step-{self.step:08d}" + (f".{self.number}" if self.number else "")


class CheckpointFolder:
    """The folder ``checkpoints`` of a run; one process alone changes it."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def latest_path(self) -> Path:
        return self.path / "latest"

    def names(self) -> list[CheckpointName]:
        """The names of all complete checkpoints, in order."""
        return [name for name in self._taken() if (self.path / str(name) / INDEX_NAME).is_file()]

    def to_try(self) -> list[CheckpointName]:
        """The checkpoints to continue from: the one that ``latest`` names, then the others, newest first."""
        names = self.names()[::-1]
        try:
            latest = self.latest_path.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return names
        return sorted(names, key=lambda name: str(name) != latest)

    def remove_leftovers(self) -> None:
        """Removes what killed processes left half-written, as far as that is possible."""
        if self.path.is_dir():
            for entry in self.path.iterdir():
                if entry.name.startswith(".") and entry.name.endswith(_PARTIAL):
                    _remove(entry)

    def partial(self, step: int, attempt: str) -> Path:
        """Where the files of a checkpoint are written until it is complete; attempt: no other has this name."""
        return self.path / f".{CheckpointName(step)}.{attempt}{_PARTIAL}"

    def publish(self, partial: Path, step: int) -> CheckpointName:
        """Gives a folder, whose files have all reached the disk, its name, and points ``latest`` to it.

        Raises OSError if that fails; the ones before are as they were.
        """
        flush_to_disk(partial)
        taken = [name.number for name in self._taken() if name.step == step]
        name = CheckpointName(step, max(taken) + 1 if taken else 0)
        os.rename(partial, self.path / str(name))
        flush_to_disk(self.path)
        with atomic_write(self.latest_path) as text:
            text.write_text(f"{name}\n", encoding="utf-8")
        return name

    def prune(self, newest: CheckpointName, options: CheckpointRecipe, best_step: int) -> None:
        """Removes what is not to be kept, as far as that is possible."""
        names = self._taken()
        for name in set(names) - names_to_keep(names, newest, options, best_step):
            # By another name first: a checkpoint whose removal is interrupted must not look like a damaged one.
            doomed = self.path / f".{name}.removed{_PARTIAL}"
            try:
                os.rename(self.path / str(name), doomed)
            except OSError:
                continue
            _remove(doomed)

    def _taken(self) -> list[CheckpointName]:
        entries = self.path.iterdir() if self.path.is_dir() else ()
        found = (_NAME.fullmatch(entry.name) for entry in entries)
        return sorted(CheckpointName(int(match[1]), int(match[2] or 0)) for match in found if match)


def names_to_keep(
    names: Iterable[CheckpointName], newest: CheckpointName, options: CheckpointRecipe, best_step: int
) -> set[CheckpointName]:
    """Returns which checkpoints stay, now that ``newest`` is written.

    Of each step the last one counts. Those of later steps are gone: the run went back behind them. Of what remains,
    the last ``keep_last`` stay, the first after every ``keep_every_steps``, and that of ``best_step``.
    """
    latest_of_step = {name.step: name for name in sorted(names) if name.step < newest.step} | {newest.step: newest}
    steps = sorted(latest_of_step)
    kept = set(steps[-options.keep_last :])
    if options.keep_every_steps:
        firsts: dict[int, int] = {}
        for step in steps:
            firsts.setdefault(step // options.keep_every_steps, step)
        kept |= {step for turn, step in firsts.items() if turn}
    if options.keep_best:
        kept |= {best_step} & set(steps)
    return {latest_of_step[step] for step in kept}


def _remove(path: Path) -> None:
    """Removes a file or folder if that is possible; what cannot be removed does no harm."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()
