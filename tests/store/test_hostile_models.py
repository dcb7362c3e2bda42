"""Changed model folders load or are refused by one sentence, never with an abort (benchmarks/hostile_models.py)."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import hostile_models


@pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_changed_folders_load_or_are_refused(tmp_path: Path, count: int):
    outcomes = list(hostile_models.try_variants(tmp_path, count, seed=count))
    assert [(outcome.change, outcome.wrong) for outcome in outcomes if outcome.wrong] == []
    refused = [outcome for outcome in outcomes if outcome.sentence]
    assert count / 4 < len(refused) < count
