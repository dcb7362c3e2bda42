"""Steps that must not change the weights: which they are, and what the run does about them."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opencoca.train import Recipe, train
from opencoca.train.recipe.recipe import OptimizerRecipe
from opencoca.train.recipe.safety import SafetyRecipe
from opencoca.train.step import NonFiniteLossError
from opencoca.train.survival.bad_steps import SpikeRule, too_many_non_finite
from opencoca.train.trainer import Trainer

from ..helpers import Pairs, read_lines, read_state, tiny_recipe


def recipe_of(warmup_steps: int = 0, **safety: Any) -> Recipe:
    return Recipe(safety=SafetyRecipe(**safety), optimizer=OptimizerRecipe(warmup_steps=warmup_steps))


class TestSpikeRule:
    @given(st.lists(st.floats(0.01, 100), min_size=32, max_size=128), st.floats(0.5, 20))
    def test_the_limit_is_the_documented_one(self, norms: list[float], deviations: float) -> None:
        rule = SpikeRule(recipe_of(spike_deviations=deviations), {"step": 500})
        for norm in norms:
            rule.add(norm)
        median = statistics.median(norms)
        distances = sorted(abs(norm - median) for norm in norms)
        spread = 1.4826 * statistics.median(distances)
        assert rule.limit() == pytest.approx(median + deviations * max(spread, 0.05 * median))

    def test_there_is_none_by_default_nor_before_it_is_known(self) -> None:
        progress: dict[str, Any] = {"step": 50}
        off, on = SpikeRule(recipe_of(), progress), SpikeRule(recipe_of(40, spike_deviations=6.0), progress)
        for _ in range(31):
            off.add(1.0)
            assert "gradient_norms" not in progress
        for _ in range(31):
            on.add(1.0)
            assert on.limit() == off.limit() == float("inf")
        on.add(1.0)
        assert on.limit() == pytest.approx(1.3)
        progress["step"] = 39
        assert on.limit() == float("inf")

    def test_one_spike_does_not_hide_the_next_and_a_new_level_is_learned(self) -> None:
        rule = SpikeRule(recipe_of(spike_deviations=6.0), {"step": 1000})
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            rule.add(1 + 0.1 * float(torch.rand((), generator=generator)))
        before = rule.limit()
        for _ in range(20):
            rule.add(1000.0)
        assert rule.limit() < 1.3 * before
        for _ in range(60):
            rule.add(1000.0)
        assert rule.limit() > 1000
        assert len(rule.progress["gradient_norms"]) == 128


def test_so_many_of_the_last_thousand_steps() -> None:
    progress: dict[str, Any] = {"step": 0}
    recipe = recipe_of(non_finite_limit=2)
    found = []
    for progress["step"] in (5, 900, 1005, 1006, 1899):
        found.append(too_many_non_finite(recipe, progress))
    assert found == [False, False, False, True, True]


def poison(trainer: Trainer, steps: set[int]) -> None:
    """A pixel of these steps' batches is not a number."""
    supply = trainer.batches.iterate

    def poisoned(first: int) -> Any:
        for number, batch in enumerate(supply(first), first):
            if number in steps:
                batch.images[0, 0, 0, 0] = float("nan")
            yield batch

    trainer.batches.iterate = poisoned


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


class Watched:
    """A trainer whose parameters after every step are recorded, by the number of steps."""

    def __init__(self, recipe: Recipe, bad: set[int], stop_after: int | None = None):
        self.trainer, self.after = Trainer(recipe), {}
        poison(self.trainer, bad)
        report = self.trainer._report_step

        def record(*args: Any) -> bool:
            step = self.trainer.state.progress["step"]
            self.after[step] = parameters(self.trainer)
            if step == stop_after:
                raise MemoryError("killed")
            return report(*args)

        self.trainer._report_step = record  # pyright: ignore

    def same(self, first: int, second: int) -> bool:
        return all(torch.equal(self.after[first][name], self.after[second][name]) for name in self.after[first])


SKIP: dict[str, Any] = {"epochs": 6, "safety__non_finite": "skip", "log_every_steps": 1}
ROLL_BACK = SKIP | {"safety__non_finite": "roll_back", "checkpoint__every_steps": 3, "validate_every_epochs": 6}


def test_skipping_leaves_the_step_out(pairs: Pairs, output: Path) -> None:
    watched = Watched(tiny_recipe(pairs, output, **SKIP), {3, 7})
    watched.trainer.run()
    assert watched.same(3, 4)
    assert watched.same(7, 8)
    assert not any(watched.same(step, step + 1) for step in (1, 2, 4, 5, 6, 8))
    events = [line for line in read_lines(output) if line["kind"] == "event"]
    assert [(line["step"], line["event"], line["count"]) for line in events] == [
        (4, "non_finite", 1),
        (8, "non_finite", 2),
    ]
    assert [line["step"] for line in read_lines(output) if line["kind"] == "train"] == [1, 2, 3, 5, 6, 7, 9, 10, 11, 12]


def test_rolling_back_returns_to_the_last_checkpoints_weights(pairs: Pairs, output: Path) -> None:
    watched = Watched(tiny_recipe(pairs, output, **ROLL_BACK, optimizer__ema_decay=0.9), {4, 5, 10})
    watched.trainer.run()
    assert watched.same(3, 5)
    assert watched.same(3, 6)
    assert not watched.same(3, 4)
    assert watched.same(9, 11)
    events = [line for line in read_lines(output) if line["kind"] == "event"]
    assert [(line["step"], line["weights_of_step"]) for line in events] == [(5, 3), (6, 3), (11, 9)]
    assert watched.trainer.state.progress["step"] == 12


@pytest.mark.parametrize("changes", [SKIP, ROLL_BACK], ids=["skip", "roll_back"])
def test_a_continued_run_meets_them_again_and_is_the_same(
    pairs: Pairs, tmp_path: Path, changes: dict[str, Any]
) -> None:
    bad, states = {4, 7, 8}, []
    for name, stops in (("whole", []), ("stopped", [5, 8])):
        recipe = tiny_recipe(pairs, tmp_path / name, **changes)
        for stop in stops:
            with pytest.raises(MemoryError, match="killed"):
                Watched(recipe, bad, stop).trainer.run()
        Watched(recipe, bad).trainer.run()
        states.append(read_state(tmp_path / name)[0])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert read_lines(tmp_path / "whole") == read_lines(tmp_path / "stopped")


def test_too_many_stop_the_run(pairs: Pairs, output: Path) -> None:
    watched = Watched(tiny_recipe(pairs, output, **SKIP, safety__non_finite_limit=2), {2, 4, 6, 8})
    with pytest.raises(NonFiniteLossError, match=r"step 6: .*number 3 in 1000 steps \(safety\.non_finite_limit\)"):
        watched.trainer.run()


def test_there_must_be_something_to_go_back_to(pairs: Pairs, output: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="There is no checkpoint yet to go back to"):
        Watched(tiny_recipe(pairs, output, **ROLL_BACK), {1}).trainer.run()


class TestSpikes:
    def test_a_spike_changes_nothing_and_is_logged(
        self, pairs: Pairs, output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = tiny_recipe(pairs, output, epochs=6, safety__spike_deviations=6.0, log_every_steps=1)
        watched = Watched(recipe, set())
        limits = iter([float("inf")] * 5 + [1e-9] + [float("inf")] * 6)
        monkeypatch.setattr(watched.trainer.spikes, "limit", lambda: next(limits))
        watched.trainer.run()
        assert watched.same(5, 6)
        assert not watched.same(4, 5)
        assert not watched.same(6, 7)
        (event,) = [line for line in read_lines(output) if line["kind"] == "event"]
        assert (event["step"], event["event"], event["limit"], event["count"]) == (6, "spike", 1e-9, 1)
        norms = [line["grad_norm"] for line in read_lines(output) if line["kind"] == "train"]
        assert watched.trainer.state.progress["gradient_norms"] == norms

    def test_a_limit_that_nothing_reaches_changes_nothing(self, pairs: Pairs, tmp_path: Path) -> None:
        with_rule = train(tiny_recipe(pairs, tmp_path / "on", epochs=3, safety__spike_deviations=1e9))
        without = train(tiny_recipe(pairs, tmp_path / "off", epochs=3))
        ours, theirs = read_state(with_rule)[0], read_state(without)[0]
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
