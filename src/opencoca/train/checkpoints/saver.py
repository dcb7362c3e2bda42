"""Saving a run's state while it goes on, and continuing from what was saved.

A save copies the state to the CPU's memory; a thread of every process then writes its part, and that of the main
process makes all of it a checkpoint once every part has reached the disk. One save is under way at a time. The threads
meet over a group of processes of their own.
"""

import contextlib
import shutil
import threading
import uuid
import warnings
from pathlib import Path

from opencoca.distributed.world import World, local_part
from opencoca.store.safetensors_file import non_finite
from opencoca.system.files import WriteError, write_error
from opencoca.system.notice import Notice
from opencoca.train.checkpoints.folder import CheckpointFolder
from opencoca.train.checkpoints.index import CheckpointIndex
from opencoca.train.checkpoints.reader import CheckpointReader
from opencoca.train.checkpoints.shard_file import FileRecord, write_shard
from opencoca.train.checkpoints.state import Snapshot, TrainState, restore, take_snapshot
from opencoca.train.recipe.safety import CheckpointRecipe

_PATIENCE_AT_EXIT_S = 60.0
_SINGLE_FILE = "last.safetensors"


class Checkpoints:
    """The checkpoints of the run in a folder; every process has one, and all call its methods in the same order."""

    def __init__(self, run_folder: Path, options: CheckpointRecipe, world: World):
        self.run_folder, self.options, self.world = run_folder, options, world
        self.folder = CheckpointFolder(run_folder / "checkpoints")
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._writers = world.with_own_group()
        self._attempts, self._run_id = 0, world.on_main(lambda: uuid.uuid4().hex[:8])

    def exist(self) -> bool:
        """Whether there is something to continue from; the answer of the main process."""
        return self.world.on_main(lambda: bool(self.folder.names()) or self._single_file.is_file())

    def newest_step(self) -> int:
        """The step of the checkpoint that a run continues from, in the main process; 0 if it is not known."""
        names = self.folder.to_try()
        return names[0].step if names else 0

    @property
    def has_failed(self) -> bool:
        """Whether a save has ended without a checkpoint in this process, and `finish` was not called since."""
        return self._error is not None and not (self._thread and self._thread.is_alive())

    def save(self, state: TrainState) -> None:
        """Begins a save; returns when the state may change again. First waits for the save before, as `finish` does.

        With ``in_background: false``, that is when `finish` returns.
        """
        self.finish()
        self._attempts += 1
        snapshot = take_snapshot(state, self.world, copy=self.options.in_background)
        partial = self.folder.partial(snapshot.progress["step"], f"{self._run_id}-{self._attempts}")
        self._thread = threading.Thread(target=self._write, args=(partial, snapshot), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits for the save under way. Raises WriteError if it failed; the checkpoints before it are as they were."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Lets a save under way come to its end, within reason; its error no longer matters."""
        if self._thread is not None:
            self._thread.join(_PATIENCE_AT_EXIT_S)

    def resume(self, state: TrainState, with_progress: bool = True) -> int | None:
        """Restores the newest checkpoint that is whole; returns its step, or None if there is none.

        One that is damaged, or whose parameters are not finite, is passed over with a warning that names the file.
        with_progress: whether `TrainState.progress` is restored, too.
        Raises ValueError if all are damaged, or if one does not fit the recipe.
        """
        names = self.world.on_main(self._clean)
        refused: list[str] = []
        for name in names:
            problem, step = self._try(self.run_folder / name, state, with_progress)
            if problem is None:
                return step
            refused.append(problem)
            if self.world.is_main and len(refused) < len(names):
                warnings.warn(f"{problem}; continuing from the checkpoint before it", Notice, stacklevel=2)
        if refused:
            raise ValueError(
                f"{refused[0]}, and there is no checkpoint before it; restore it from a copy, or delete "
                f"{self.folder.path} to begin the run anew"
            )
        return None

    @property
    def _single_file(self) -> Path:
        return self.run_folder / _SINGLE_FILE

    def _clean(self) -> list[str]:
        self.folder.remove_leftovers()
        names = [f"{self.folder.path.name}/{name}" for name in self.folder.to_try()]
        return names + ([_SINGLE_FILE] if self._single_file.is_file() else [])

    def _try(self, path: Path, state: TrainState, with_progress: bool) -> tuple[str | None, int]:
        """Restores one checkpoint; returns what is wrong with it, as all processes agree, and its step."""
        reader, problem = None, None
        try:
            reader = CheckpointReader(path)
            reader.check(self.world.rank, self.world.size)
        except ValueError as error:
            problem = str(error)
        if agreed := self._first_problem(problem):
            return agreed, 0
        assert reader is not None
        try:
            restore(state, reader, self.world)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"checkpoint {path} does not fit this recipe's model ({error}); choose another --output, or delete "
                f"{self.folder.path} to begin the run anew"
            ) from error
        bad = non_finite({name: local_part(value) for name, value in state.model.named_parameters()})
        if agreed := self._first_problem(f"checkpoint {path} holds a {bad[0]} that is not finite" if bad else None):
            return agreed, 0
        if with_progress:
            state.progress.clear()
            state.progress.update(reader.progress)
        return None, reader.progress["step"]

    def _first_problem(self, own: str | None) -> str | None:
        return next((problem for problem in self.world.gather_results(own) if problem), None)

    def _write(self, partial: Path, snapshot: Snapshot) -> None:
        """Runs in the thread: writes this process's part; the main process then makes a checkpoint of all parts."""
        try:
            record, error = None, None
            try:
                record = self._write_part(partial, snapshot)
            except Exception as raised:
                error = _told(partial, raised)
            parts = self._writers.gather_results((record, error))
            error = next((told for _, told in parts if told), None)
            if error is None:
                records = tuple(record for record, _ in parts if record)
                published = lambda: self._publish(partial, snapshot, records)  # noqa: E731
                error = self._writers.on_main(published)
            if error is not None:
                raise error
        except Exception as raised:
            self._error = raised
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)

    def _write_part(self, partial: Path, snapshot: Snapshot) -> FileRecord:
        partial.mkdir(parents=True, exist_ok=True)
        return write_shard(partial / f"rank-{self.world.rank:05d}.safetensors", snapshot.tensors)

    def _publish(self, partial: Path, snapshot: Snapshot, records: tuple[FileRecord, ...]) -> Exception | None:
        """Makes a checkpoint of the parts, in the main process; returns what went wrong, for all processes."""
        progress = snapshot.progress
        index = CheckpointIndex(progress["step"], progress, snapshot.average_updates, records, snapshot.layouts)
        try:
            index.write(partial)
            newest = self.folder.publish(partial, index.step)
        except Exception as error:
            return _told(partial, error)
        self.folder.prune(newest, self.options, progress.get("best_step", 0))
        if len(self.folder.names()) >= self.options.keep_last:
            with contextlib.suppress(OSError):
                self._single_file.unlink()
        return None


def _told(partial: Path, error: Exception) -> Exception:
    """The error in a form that can be sent to other processes."""
    if isinstance(error, WriteError):
        return error
    if isinstance(error, OSError):
        return write_error(partial.parent, error)
    return RuntimeError(f"the checkpoint in {partial.parent} could not be written: {error!r}")
