"""Runs that are killed with SIGKILL, again and again, end as if they had not been (benchmarks/kill_and_resume.py)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"


def killed_runs(out: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(_PROGRAM), "--out", str(out), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert result.returncode == 0, result.stdout + result.stderr
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    for run in runs:
        assert run["tensors_differing"] == []
        assert run["tensors_compared"] > 250
        assert run["metric_lines_equal"]
    return runs


def test_a_killed_run_is_the_same(tmp_path: Path) -> None:
    (run,) = killed_runs(tmp_path / "result.json", "--kills", "2", "--ranks", "1", "--steps-per-kill", "10")
    assert run["kills"] == 2


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("task", ["pretraining", "classification"])
def test_twenty_kills_of_one_process_or_of_two(tmp_path: Path, task: str) -> None:
    for run in killed_runs(tmp_path / "result.json", "--kills", "20", "--ranks", "1", "2", "--task", task):
        assert run["kills"] == 20
        assert run["kills_while_writing"] > 2


@pytest.mark.slow
@pytest.mark.distributed
def test_kills_of_sharded_processes(tmp_path: Path) -> None:
    (run,) = killed_runs(tmp_path / "result.json", "--kills", "6", "--ranks", "2", "--strategy", "fsdp")
    assert run["kills"] == 6
