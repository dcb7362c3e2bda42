"""A run that hangs is found, says where it stands, and ends such that it can be started again."""

import ctypes
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import opencoca.train.survival.watchdog as watchdog_module
from opencoca.distributed.world import World
from opencoca.train.survival.watchdog import EXIT_CODE, Watchdog
from processes import kill, start


def waits_for_another_process(seconds: int, holds_lock: bool) -> None:
    if holds_lock:
        ctypes.PyDLL(None).sleep(seconds)  # sleep() of the C library, called such that Python's lock is kept
    time.sleep(seconds)


def hang(folder: Path, holds_lock: bool, limit_s: float) -> None:
    with Watchdog(folder, World(1, 2), limit_s=limit_s, exits=True, grace_s=0.3) as watchdog:
        watchdog.alive(17)
        threading.Thread(target=waits_for_another_process, args=(30, holds_lock), daemon=True).start()
        waits_for_another_process(30, holds_lock)
    print("went on")


def hanging(folder: Path, holds_lock: bool = False, limit_s: float = 0.5) -> tuple[int | None, str]:
    """The exit code of a process that hangs, and what it printed."""
    output = folder.with_name("output.txt")
    process = start(hang, folder, holds_lock, limit_s, output=output)
    process.join(60)
    code = process.exitcode
    kill(process)
    return code, output.read_text(encoding="utf-8")


def test_a_hanging_process_writes_its_stacks_and_exits(tmp_path: Path) -> None:
    code, printed = hanging(tmp_path / "stacks")
    assert code == EXIT_CODE
    (file,) = (tmp_path / "stacks").iterdir()
    assert file.name.endswith("-rank-00001.txt")
    text = file.read_text(encoding="utf-8")
    assert text.startswith("process 1 of 2, after step 17\n")
    assert text.count("in waits_for_another_process") == 2  # of both threads
    (line,) = printed.strip().splitlines()
    assert line.startswith("opencoca: process 1 has completed no step for 0.5 seconds, after step 17")
    assert str(file) in line


def test_so_does_one_that_holds_pythons_lock(tmp_path: Path) -> None:
    code, printed = hanging(tmp_path / "stacks", holds_lock=True, limit_s=0.4)
    assert code not in (None, 0, -9)
    assert "in waits_for_another_process" in printed
    assert "went on" not in printed


def test_a_disk_that_cannot_be_written_does_not_keep_it(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("in the way")
    code, printed = hanging(tmp_path / "stacks")
    assert code == EXIT_CODE
    assert "in waits_for_another_process" in printed


class Clock:
    """Time as a watchdog sees it, which passes only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.looks = 0.0, threading.Semaphore(0)
        monkeypatch.setattr(watchdog_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(watchdog_module, "_LOOKS_EVERY_S", 0.001)
        monkeypatch.setattr(Watchdog, "_arm", lambda _: self.looks.release())

    def forward(self, seconds: float) -> None:
        """Returns when a look that began after this is over: the third to begin, as the first may have begun before."""
        self.now += seconds
        while self.looks.acquire(blocking=False):
            pass
        for _ in range(3):
            assert self.looks.acquire(timeout=60)


def test_slow_is_not_hanging(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with Watchdog(tmp_path, World(), limit_s=100.0, exits=False) as watchdog:
        for step in range(6):
            clock.forward(90)
            watchdog.alive(step)
        with watchdog.paused():
            clock.forward(150)
        clock.forward(90)
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_alone_it_only_tells_and_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with Watchdog(tmp_path, World(), limit_s=100.0, exits=False) as watchdog:
        for _ in range(3):
            clock.forward(90)
        assert len(list(tmp_path.iterdir())) == 1
        watchdog.alive(1)
        clock.forward(90)
    assert capsys.readouterr().err.count("it may only be slow") == 1


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    with Watchdog(tmp_path, World(), limit_s=0.0, exits=True):
        time.sleep(0.2)
    assert list(tmp_path.iterdir()) == []
