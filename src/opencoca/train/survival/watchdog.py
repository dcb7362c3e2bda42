"""Finding a run that hangs: which line every thread of every process stands at, and an end that torchrun can repair.

A process that waits for another one that will never answer looks like one that works. So each watches itself: if a
step takes too long it writes its stacks, and as all wait for one another, all do.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from opencoca.distributed.world import World

EXIT_CODE = 75  # sysexits.h: a temporary failure, try again
_LOOKS_EVERY_S = 1.0  # at least, and more often where the limit is short
_GRACE_S = 10.0  # for the other processes' stacks, and for a disk that hangs, too


class Watchdog:
    """``with Watchdog(...) as watchdog``: ``watchdog.alive(step)`` must be called at least every so many seconds."""

    def __init__(self, folder: Path, world: World, limit_s: float, exits: bool, grace_s: float = _GRACE_S):
        """folder: where the stacks go. limit_s: 0 = watches nothing. exits: ends the process; if not, it only tells."""
        self.folder, self.world, self.limit_s, self.exits, self.grace_s = folder, world, limit_s, exits, grace_s
        self._step, self._beat, self._paused = 0, time.monotonic(), False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self.limit_s > 0:
            self._beat = time.monotonic()
            self._over.clear()
            self._arm()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def alive(self, step: int) -> None:
        """Tells that step number ``step`` is complete."""
        self._step, self._beat = step, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Watches nothing while work goes on that may take any time."""
        self._paused = True
        try:
            yield
        finally:
            self._beat, self._paused = time.monotonic(), False

    def _watch(self) -> None:
        told_at = None
        while not self._over.wait(min(_LOOKS_EVERY_S, self.limit_s / 10)):
            self._arm()
            if self._paused or time.monotonic() - self._beat < self.limit_s or told_at == self._beat:
                continue
            told_at = self._beat
            self._tell()
            if self.exits and not self._over.is_set():
                os._exit(EXIT_CODE)
        if self.exits:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        """Starts anew a timer outside of Python, which also ends a process whose Python threads are all blocked."""
        if self.exits:
            faulthandler.dump_traceback_later(self.limit_s + 2 * self.grace_s + 1, exit=True)

    def _tell(self) -> None:
        then = "exiting, so that torchrun can restart the processes" if self.exits else "it may only be slow"
        path = self.folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-rank-{self.world.rank:05d}.txt"
        print(
            f"opencoca: process {self.world.rank} has completed no step for {self.limit_s:g} seconds, after step "
            f"{self._step}; the stacks of its threads are in {path}; {then} (safety.hang_minutes)",
            file=sys.stderr,
            flush=True,
        )
        # In a thread, because the disk may be what hangs.
        writer = threading.Thread(target=self._write, args=(path,), daemon=True)
        writer.start()
        writer.join(self.grace_s)
        if self.exits:
            self._over.wait(self.grace_s)

    def _write(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"process {self.world.rank} of {self.world.size}, after step {self._step}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"opencoca: cannot write {path} ({error})", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)


def is_restartable() -> bool:
    """Whether this process was started by torchrun, or something like it, which knows of the others."""
    return os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"}
