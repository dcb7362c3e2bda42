"""Which parameters decay, how the learning rate runs, and the moving average."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opencoca.model.coca import CoCa
from opencoca.system.allocator import keep_freed_memory
from opencoca.train.optim.optimizer import (
    WeightAverage,
    build_optimizer,
    freeze,
    learning_rate_factor,
    parameter_groups,
)
from opencoca.train.recipe.optimizer import OptimizerRecipe
from opencoca.train.trainer import Trainer

from ..helpers import Pairs, tiny_recipe


def groups_by_name(trainer: Trainer) -> dict[str, tuple[float, float]]:
    """(peak learning rate, weight decay) of every parameter that is trained."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.state.optimizer.param_groups
    found = [(names[id(p)], (g["peak_lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_nothing_else(pairs: Pairs, output: Path, tied: bool) -> None:
    changes: dict[str, Any] = {"model__text__tie_embeddings": tied, "optimizer__weight_decay": 0.07}
    trainer = Trainer(tiny_recipe(pairs, output, **changes))
    decays = {name: decay for name, (_, decay) in groups_by_name(trainer).items()}
    assert decays.keys() == dict(trainer.model.named_parameters()).keys()
    for module_name, module in trainer.model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, nn.Linear | nn.Conv2d) and name == "weight"
            if parameter is trainer.model.unimodal_decoder.token_embed.weight:
                is_matrix = False  # tied, it is the embedding all the same
            full = f"{module_name}.{name}".removeprefix(".")
            if full in decays:
                assert decays[full] == (0.07 if is_matrix else 0.0), full
    kinds = ("pos_embed", "query", "token_embed.weight", "log_logit_scale", "cls_embed", "norm1.weight", "proj.bias")
    for kind in kinds:
        chosen = [decay for name, decay in decays.items() if name.endswith(kind)]
        assert set(chosen) == {0.0}, kind


def test_the_encoder_has_its_own_learning_rate(pairs: Pairs, output: Path) -> None:
    changes: dict[str, Any] = {"encoder__learning_rate": 3e-5, "encoder__frozen_stages": 2}
    trainer = Trainer(tiny_recipe(pairs, output, optimizer__learning_rate=2e-3, **changes))
    rates = {name: rate for name, (rate, _) in groups_by_name(trainer).items()}
    for name, parameter in trainer.model.named_parameters():
        frozen = name.startswith(("image_encoder.stages.0.", "image_encoder.stages.1."))
        assert parameter.requires_grad != frozen
        expected = None if frozen else 3e-5 if name.startswith("image_encoder.") else 2e-3
        assert rates.get(name) == expected, name


def test_both_learning_rates_follow_the_schedule(pairs: Pairs, output: Path) -> None:
    trainer = Trainer(tiny_recipe(pairs, output, encoder__learning_rate=1e-4, optimizer__warmup_steps=4))
    trainer.step(next(trainer.batches.iterate(0)), 1, 10)
    assert {group["lr"] for group in trainer.state.optimizer.param_groups} == {0.5 * 1e-4, 0.5 * 2e-3}


@pytest.mark.parametrize(("asked", "frozen"), [(0, 0), (1, 1), (4, 4), (-1, 4)])
def test_freezing_stages(pairs: Pairs, output: Path, asked: int, frozen: int) -> None:
    recipe = tiny_recipe(pairs, output, encoder__frozen_stages=asked)
    model = CoCa(recipe.model)
    assert freeze(model, recipe) == frozen
    trained = [any(p.requires_grad for p in stage.parameters()) for stage in model.image_encoder.stages]
    assert trained == [False] * frozen + [True] * (4 - frozen)


def test_freezing_more_stages_than_there_are(pairs: Pairs, output: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder\.frozen_stages 5.*4 stages"):
        Trainer(tiny_recipe(pairs, output, encoder__frozen_stages=5))


def test_groups_are_what_the_optimizer_gets(pairs: Pairs, output: Path) -> None:
    trainer = Trainer(tiny_recipe(pairs, output, optimizer__betas=[0.8, 0.95], optimizer__eps=1e-7))
    optimizer = build_optimizer(trainer.model, trainer.recipe)
    assert len(optimizer.param_groups) == len(parameter_groups(trainer.model, trainer.recipe))
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-7 for group in optimizer.param_groups)


class TestSchedule:
    @pytest.mark.parametrize(
        ("decay", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
    )
    def test_warm_up_middle_and_end(self, decay: Any, middle: float, end: float) -> None:
        options = OptimizerRecipe(warmup_steps=10, decay=decay, final_lr_fraction=0.1)
        factors = [learning_rate_factor(step, 110, options) for step in range(111)]
        assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert factors[10] == pytest.approx(1.0)
        assert factors[60] == pytest.approx(middle)
        assert factors[110] == pytest.approx(end)

    def test_cosine_and_linear_differ_between(self) -> None:
        cosine, linear = (OptimizerRecipe(warmup_steps=0, decay=decay) for decay in ("cosine", "linear"))
        assert learning_rate_factor(25, 100, linear) == pytest.approx(0.75)
        assert learning_rate_factor(25, 100, cosine) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)

    @given(
        st.sampled_from(["cosine", "linear", "constant"]),
        st.integers(0, 60),
        st.integers(1, 100),
        st.floats(0, 1, allow_nan=False),
    )
    def test_never_above_the_peak_never_negative_one_hill(
        self, decay: Any, warmup: int, total: int, final: float
    ) -> None:
        options = OptimizerRecipe(warmup_steps=warmup, decay=decay, final_lr_fraction=final)
        factors = [learning_rate_factor(step, total, options) for step in range(total)]
        assert all(0 < factor <= 1 + 1e-12 for factor in factors)
        top = min(warmup, total)
        assert factors[:top] == sorted(factors[:top])
        assert all(later <= earlier + 1e-12 for earlier, later in zip(factors[top:], factors[top + 1 :], strict=False))
        assert all(factor >= final - 1e-12 for factor in factors[warmup:])


class TestWeightAverage:
    def small(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        model[1].requires_grad_(False)
        return model

    @pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
    def test_follows_the_formula(self, decay: float) -> None:
        model = self.small()
        average = WeightAverage(model, decay)
        expected = model[0].weight.detach().double().clone()
        for update in range(40):
            with torch.no_grad():
                model[0].weight.add_(torch.randn(4, 3))
            average.update()
            kept = min(decay, (1 + update) / (10 + update))
            expected = kept * expected + (1 - kept) * model[0].weight.detach().double()
            assert torch.allclose(average.state()["0.weight"].double(), expected, atol=1e-5)

    def test_keeps_what_is_trained_alone(self) -> None:
        assert WeightAverage(self.small(), 0.9).state().keys() == {"0.weight", "0.bias"}

    def test_swapping_twice_is_the_identity(self) -> None:
        model = self.small()
        average = WeightAverage(model, 0.9)
        with torch.no_grad():
            model[0].weight.add_(1)
        weights, averages = copy.deepcopy(model.state_dict()), copy.deepcopy(average.state())
        storage = model[0].weight.data_ptr()
        average.swap()
        assert torch.equal(model[0].weight, averages["0.weight"])
        assert torch.equal(average.state()["0.weight"], weights["0.weight"])
        average.swap()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert all(torch.equal(value, averages[name]) for name, value in average.state().items())
        assert model[0].weight.data_ptr() == storage  # the optimizer holds this tensor

    def test_a_run_averages_its_own_weights(self, pairs: Pairs, output: Path) -> None:
        trainer = Trainer(tiny_recipe(pairs, output, optimizer__ema_decay=0.7))
        assert trainer.average is not None
        expected = {name: parameter.detach().double().clone() for name, parameter in trainer.model.named_parameters()}
        supply = trainer.batches.iterate(0)
        for step in range(4):
            trainer.step(next(supply), step, 4)
            kept = min(0.7, (1 + step) / (10 + step))
            for name, parameter in trainer.model.named_parameters():
                expected[name] = kept * expected[name] + (1 - kept) * parameter.detach().double()
        for name, average in trainer.average.state().items():
            assert torch.allclose(average.double(), expected[name], atol=1e-6), name


def test_keeping_freed_memory_may_be_asked_for_twice() -> None:
    answers = [keep_freed_memory(), keep_freed_memory()]
    assert answers[0] is answers[1]
    assert isinstance(answers[0], bool)
    assert torch.randn(300, 300).matmul(torch.randn(300, 300)).isfinite().all()
