"""Changed model folders load or are refused by one sentence, never with an abort (benchmarks/hostile_models.py)."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import hostile_models


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_changed_folders_load_or_are_refused(count: int):
    found = hostile_models.attempt(count, 0, count)
    assert [(trial.name, trial.fault) for trial in found if trial.fault] == []
    assert count / 4 < sum(bool(trial.refusal) for trial in found) < count
