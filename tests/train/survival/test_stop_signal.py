"""Signals are requests: a run saves and ends; what may be given up is, and a second Ctrl-C is not asked twice."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from opencoca.train import train
from opencoca.train.survival import stop_signal
from opencoca.train.survival.stop_signal import StopSignal
from opencoca.train.trainer import Trainer, TrainingInterrupted

from ..helpers import Pairs, ask_to_stop, read_lines, run_until_stopped, tiny_recipe


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_handlers_are_put_back(name: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.asked
        ask_to_stop(name)
        assert stop.asked
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_same_request_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes on what the terminal has sent to all."""
    with StopSignal() as stop:
        ask_to_stop(signal.SIGINT)
        ask_to_stop(signal.SIGINT)
        ask_to_stop(signal.SIGTERM)
        now = time.monotonic() + 1.5
        monkeypatch.setattr(stop_signal.time, "monotonic", lambda: now)
        ask_to_stop(signal.SIGTERM)  # a machine that is being taken away says so again and again
        with pytest.raises(KeyboardInterrupt):
            ask_to_stop(signal.SIGINT)
        assert stop.asked


def test_work_is_given_up_at_once() -> None:
    with StopSignal() as stop:
        assert stop.unless_asked(lambda: 7) == 7
        began = time.monotonic()
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        timer.start()
        assert stop.unless_asked(lambda: time.sleep(30)) is None
        assert time.monotonic() - began < 10
        assert stop.unless_asked(lambda: pytest.fail("began after the signal")) is None


def test_other_errors_of_the_work_pass() -> None:
    with StopSignal() as stop, pytest.raises(ZeroDivisionError):
        stop.unless_asked(lambda: 1 / 0)


def test_in_another_thread_signals_are_left_alone() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with StopSignal() as stop:
            found.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_a_validation_that_was_given_up_is_made_up_for(pairs: Pairs, tmp_path: Path) -> None:
    recipe = tiny_recipe(pairs, tmp_path / "run", epochs=3)
    trainer = Trainer(recipe)
    real = trainer.validator
    assert real is not None

    def slow(model: Any) -> Any:
        ask_to_stop()
        pytest.fail("went on")

    trainer.validator = slow  # pyright: ignore
    with pytest.raises(TrainingInterrupted, match="after step 2 of 6"):
        trainer.run()
    assert [line["kind"] for line in read_lines(tmp_path / "run")] == []
    # In the last step, too, and once more before it is made up for.
    last = run_until_stopped(recipe, validations=3)
    assert last.state.progress["step"] == 6
    assert run_until_stopped(recipe, validations=1).state.progress["step"] == 6
    train(recipe)
    whole = train(tiny_recipe(pairs, tmp_path / "whole", epochs=3))
    assert read_lines(tmp_path / "run") == read_lines(whole)
    assert [line["step"] for line in read_lines(whole) if line["kind"] == "validation"] == [2, 4, 6]
