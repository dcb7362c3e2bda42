"""A run that hangs is found, says where it stands, and ends such that it can be started again."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from opencoca.distributed import World
from opencoca.train.watchdog import EXIT_CODE, Watchdog

_HANGS = """
import sys, threading, time
from pathlib import Path
from opencoca.distributed import World
from opencoca.train.watchdog import Watchdog

def waits_for_another_process(seconds):
    {wait}

with Watchdog(Path(sys.argv[1]), World(1, 2), limit_s={limit}, exits=True, grace_s=0.3) as watchdog:
    watchdog.alive(17)
    threading.Thread(target=waits_for_another_process, args=(30,), daemon=True).start()
    waits_for_another_process(30)
print("went on")
"""


def hang(folder: Path, wait: str, limit_s: float = 0.5) -> subprocess.CompletedProcess[str]:
    program = _HANGS.format(wait=wait, limit=limit_s)
    return subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60)


def test_a_hanging_process_writes_its_stacks_and_exits(tmp_path: Path) -> None:
    result = hang(tmp_path / "stacks", "time.sleep(seconds)")
    assert result.returncode == EXIT_CODE
    assert "went on" not in result.stdout
    (file,) = (tmp_path / "stacks").iterdir()
    assert file.name.endswith("-rank-00001.txt")
    text = file.read_text(encoding="utf-8")
    assert text.startswith("process 1 of 2, after step 17\n")
    assert text.count("in waits_for_another_process") == 2  # of both threads
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("opencoca: process 1 has completed no step for 0.5 seconds, after step 17")
    assert str(file) in line


def test_so_does_one_that_holds_pythons_lock(tmp_path: Path) -> None:
    # sleep() of the C library, called such that Python's lock is kept.
    result = hang(tmp_path / "stacks", "import ctypes; ctypes.PyDLL(None).sleep(seconds)", limit_s=0.4)
    assert result.returncode not in (0, -9)
    assert "in waits_for_another_process" in result.stderr


def test_a_disk_that_cannot_be_written_does_not_keep_it(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("in the way")
    result = hang(tmp_path / "stacks", "time.sleep(seconds)")
    assert result.returncode == EXIT_CODE
    assert "in waits_for_another_process" in result.stderr


def test_slow_is_not_hanging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Watchdog(tmp_path, World(), limit_s=1.0, exits=False) as watchdog:
        for step in range(6):
            time.sleep(0.25)
            watchdog.alive(step)
        with watchdog.paused():
            time.sleep(1.5)
        time.sleep(0.3)
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_alone_it_only_tells_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Watchdog(tmp_path, World(), limit_s=0.3, exits=False) as watchdog:
        time.sleep(1.2)
        assert len(list(tmp_path.iterdir())) == 1
        watchdog.alive(1)
        time.sleep(0.1)
    assert capsys.readouterr().err.count("it may only be slow") == 1


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    with Watchdog(tmp_path, World(), limit_s=0.0, exits=True):
        time.sleep(0.2)
    assert list(tmp_path.iterdir()) == []
