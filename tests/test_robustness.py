"""Damaged and hostile inputs are used or refused (benchmarks/robustness.py): a few, and all where it is slow."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def faults(trials):
    return [f"{trial.name}: {trial.fault}" for trial in trials if trial.fault]


@pytest.mark.parametrize(("kind", "count"), [("images", 150), ("tars", 15)])
def test_some(kind, count, monkeypatch):
    monkeypatch.syspath_prepend(_BENCHMARKS)
    trials = importlib.import_module(f"hostile_{kind}").attempt(7, 0, count)
    assert len(trials) == count
    assert faults(trials) == []
    assert any(trial.refusal for trial in trials)
    assert not all(trial.refusal for trial in trials)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "tars"])
def test_all(kind, monkeypatch):
    monkeypatch.syspath_prepend(_BENCHMARKS)
    robustness = importlib.import_module("robustness")
    attempt, count = robustness.KINDS[kind]
    assert faults(robustness.run(attempt, count, 0)) == []
