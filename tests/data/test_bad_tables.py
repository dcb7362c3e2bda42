"""Whatever is in a table, it is read or refused by one short sentence that names it, and soon."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def attempt(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    modules = {"hostile_tables", "trials"} - sys.modules.keys()
    import hostile_tables

    yield hostile_tables.attempt
    for name in modules:
        sys.modules.pop(name, None)


def test_each_is_read_or_refused_by_one_sentence(attempt):
    found = attempt(0, 0, 160)
    assert [trial for trial in found if trial.fault] == []
    refused = sum(bool(trial.refusal) for trial in found)
    assert 50 < refused < 150
