"""Changed model folders load or are refused by one sentence, never with an abort (benchmarks/hostile_models.py)."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import hostile_models


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_changed_folders_load_or_are_refused(count: int):
    found = hostile_models.attempt(0, 0, count)
    assert [(trial.name, trial.fault) for trial in found if trial.fault] == []
    assert sum(bool(trial.refusal) for trial in found) > count / 4


def test_the_folder_before_its_change_is_sound(tmp_path: Path):
    hostile_models.make_sound_folder(tmp_path)
    hostile_models.use(tmp_path)
