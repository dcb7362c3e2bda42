"""One process at a time holds a lock; it is free again when that process has ended."""

import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from opencoca.system.process_lock import ProcessLock


def in_child(work: Callable[[], bool]) -> bool:
    """What the work says in a forked process."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_another_process_learns_who_holds_it(tmp_path: Path) -> None:
    lock = ProcessLock(tmp_path / ".lock")
    assert lock.take() is None
    holder = f"{os.getpid()} on {os.uname().nodename}"
    assert in_child(lambda: ProcessLock(tmp_path / ".lock").take() == holder)
    assert in_child(lambda: lock.give_back() is None and lock.path.exists())  # it is not a child's to give back
    lock.give_back()
    assert list(tmp_path.iterdir()) == []
    assert in_child(lambda: ProcessLock(tmp_path / ".lock").take() is None)


def test_a_killed_process_and_its_workers_hold_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # takes the lock, has a worker that outlives it, and is killed
        lock = ProcessLock(tmp_path / ".lock")
        lock.take()
        worker = os.fork()
        if worker == 0:
            signal.pause()
        os.write(writing, f"{worker} ".encode())
        signal.pause()
    worker = int(os.read(reading, 20))
    try:
        assert ProcessLock(tmp_path / ".lock").take().startswith(f"{child} on ")  # pyright: ignore
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        child = None
        assert (tmp_path / ".lock").exists()
        assert ProcessLock(tmp_path / ".lock").take() is None
    finally:
        for process in filter(None, (child, worker)):
            os.kill(process, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_a_file_that_is_removed_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lockf = tmp_path / ".lock", fcntl.lockf

    def given_back_first(*arguments: int) -> None:
        monkeypatch.setattr(fcntl, "lockf", lockf)
        path.unlink()
        lockf(*arguments)

    path.touch()
    monkeypatch.setattr(fcntl, "lockf", given_back_first)
    lock = ProcessLock(path)
    assert lock.take() is None
    assert not in_child(lambda: ProcessLock(path).take() is None)
    del lock
    assert not path.exists()
