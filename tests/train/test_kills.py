"""Runs that are killed with SIGKILL, again and again, end as if they had not been (benchmarks/kill_and_resume.py)."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from opencoca.cli import main
from processes import start

_PROGRAM = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"


def check(run: dict[str, Any], kills: int) -> None:
    assert run["kills"] == kills
    assert run["tensors_differing"] == []
    assert run["tensors_compared"] > 250
    assert run["metric_lines_equal"]


def killed_runs(out: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(_PROGRAM), "--out", str(out), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(out.read_text(encoding="utf-8"))["runs"]


def train_without_report(recipe: str) -> None:
    with patch("opencoca.train.trainer.write_report", lambda *_: None):
        sys.exit(main(["train", recipe]))


class CopiedProcess:
    """A process as `subprocess.Popen` shows it, copied from one that has imported everything."""

    def __init__(self, command: list[str], stdout: Any, **_: object):
        self.process = start(train_without_report, command[-1], output=Path(stdout.name))
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> None:
        self.process.join()


def test_a_killed_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(_PROGRAM.parent)
    import kill_and_resume  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(kill_and_resume.subprocess, "Popen", CopiedProcess)
    options = Namespace(strategy="ddp", kills=2, seed=0, targets=["one", "all"], steps_per_kill=10, task="pretraining")
    check(kill_and_resume.compare(options, 1, tmp_path), 2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("task", ["pretraining", "classification"])
def test_twenty_kills_of_one_process_or_of_two(tmp_path: Path, task: str) -> None:
    for run in killed_runs(tmp_path / "result.json", "--kills", "20", "--ranks", "1", "2", "--task", task):
        check(run, 20)
        assert run["kills_while_writing"] > 2


@pytest.mark.slow
@pytest.mark.distributed
def test_kills_of_sharded_processes(tmp_path: Path) -> None:
    (run,) = killed_runs(tmp_path / "result.json", "--kills", "6", "--ranks", "2", "--strategy", "fsdp")
    check(run, 6)
