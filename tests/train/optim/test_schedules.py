"""How the learning rate runs after warm-up where it is neither cosine nor linear (those: test_optimizer.py)."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoca.train.optim.optimizer import learning_rate_factor
from opencoca.train.recipe.optimizer import OptimizerRecipe


def test_wsd_is_constant_and_then_linear() -> None:
    options = OptimizerRecipe(warmup_steps=10, decay="wsd", decay_fraction=0.25, final_lr_fraction=0.2)
    factors = [learning_rate_factor(step, 200, options) for step in range(201)]
    assert factors[9:150] == [1.0] * 141
    assert factors[175] == pytest.approx(0.6)
    assert factors[200] == pytest.approx(0.2)
    assert [a - b for a, b in pairwise(factors[150:])] == pytest.approx([0.8 / 50] * 50)


def test_wsd_whose_decay_is_all_of_the_run_is_linear_decay() -> None:
    wsd = OptimizerRecipe(warmup_steps=5, decay="wsd", decay_fraction=1.0)
    linear = OptimizerRecipe(warmup_steps=5, decay="linear")
    for step in range(50):
        assert learning_rate_factor(step, 50, wsd) == learning_rate_factor(step, 50, linear)


@given(st.integers(0, 30), st.integers(1, 100), st.floats(0, 1), st.floats(0, 1))
def test_wsd_stays_between_its_ends_and_never_rises_again(warmup: int, total: int, part: float, final: float) -> None:
    options = OptimizerRecipe(warmup_steps=warmup, decay="wsd", decay_fraction=part, final_lr_fraction=final)
    factors = [learning_rate_factor(step, total, options) for step in range(warmup, max(warmup, total))]
    assert all(final - 1e-12 <= factor <= 1 for factor in factors)
    assert factors == sorted(factors, reverse=True)
