"""Sub-batches (GradCache) give the gradient of the batch in one pass, dropout included, and save memory."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.cases import Case, make_batch, make_model, make_recipe
from opencoca.data import Batch
from opencoca.distributed.world import World
from opencoca.losses import captioning_loss, contrastive_loss
from opencoca.model.coca import CoCa, CoCaOutput
from opencoca.train.gradient import BatchGradient
from opencoca.train.parallel import ParallelModel
from opencoca.train.recipe.recipe import Recipe

CPU = torch.device("cpu")


def gradients(model: CoCa) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def forward(model: CoCa, batch: Batch) -> CoCaOutput:
    return model(batch.images, batch.token_ids, batch.token_mask)


def one_pass(model: CoCa, case: Case, recipe: Recipe, seed_of: Callable[[int], int]) -> tuple[dict[str, Tensor], float]:
    """All sub-batches with their graphs at once, and the written-out objective over all of them."""
    batch, outputs = make_batch(case, World()), []
    for number, part in enumerate(batch.split(1)[0].split(case.grad_cache_steps)):
        torch.manual_seed(seed_of(number))
        outputs.append(forward(model, part))
    contrastive = contrastive_loss(
        torch.cat([output.image_embed for output in outputs]),
        torch.cat([output.text_embed for output in outputs]),
        model.logit_scale,
        batch.sample_ids,
        batch.sample_ids.repeat_interleave(case.captions_per_image),
    )
    caption = captioning_loss(
        torch.cat([output.hidden for output in outputs]),
        torch.cat([output.next_ids for output in outputs]),
        model.lm_head.weight,
        label_smoothing=recipe.task.label_smoothing,
    )
    loss = recipe.task.contrastive_weight * contrastive + recipe.task.caption_weight * caption
    loss.backward()
    return gradients(model), float(loss.detach())


def seeds(recipe: Recipe, step: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that a step sets, in order."""
    found: list[int] = []
    real = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (found.append(seed), real(seed))[1])
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("steps", [*(pytest.param(steps, marks=pytest.mark.slow) for steps in (2, 3)), 5, 12])
@pytest.mark.parametrize("arrangement", ["cascade", "parallel", "shared"])
def test_equals_the_batch_in_one_pass(
    steps: int, dropout: float, arrangement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(dropout=dropout, grad_cache_steps=steps, double=True, arrangement=arrangement)
    recipe = make_recipe(case)
    model = make_model(case, recipe).train()
    used = seeds(recipe, 3, monkeypatch)
    losses = BatchGradient(ParallelModel(model, CPU, recipe), recipe)(make_batch(case, World()), 3)
    cached = gradients(model)
    # Each sub-batch draws the same numbers in both passes, and other numbers than the others.
    assert used[:steps] == used[steps:]
    assert len(set(used)) == steps
    expected, loss = one_pass(model, case, recipe, lambda number: used[number])
    assert cached.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(cached[name], gradient, rtol=0, atol=1e-9), name
    assert float(losses.total) == pytest.approx(loss, abs=1e-9)


def test_dropout_makes_a_difference() -> None:
    """Or the test above would say nothing of it; and it is another one in every step and for every seed."""
    case = Case(dropout=0.3, grad_cache_steps=2, double=True)
    totals = []
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        recipe = replace(make_recipe(case), seed=seed)
        model = make_model(case, recipe).train()
        batch = make_batch(case, World())
        totals.append(float(BatchGradient(ParallelModel(model, CPU, recipe), recipe)(batch, step).total))
    assert totals[0] == totals[1]
    assert len(set(totals)) == 3


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_negatives_are_those_of_the_whole_micro_batch(steps: int) -> None:
    """More sub-batches change nothing; more micro-batches do."""

    def contrastive(**changes: Any) -> float:
        case = Case(double=True, **changes)
        recipe = make_recipe(case)
        gradient = BatchGradient(ParallelModel(make_model(case, recipe), CPU, recipe), recipe)
        return float(gradient(make_batch(case, World()), 0).terms["contrastive"])

    assert contrastive(grad_cache_steps=steps) == pytest.approx(contrastive(), abs=1e-12)
    accumulated = contrastive(accumulation_steps=2)
    assert accumulated < contrastive() - 0.1
    assert contrastive(accumulation_steps=2, grad_cache_steps=steps) == pytest.approx(accumulated, abs=1e-12)


class Kept:
    """What a graph holds on to."""


def most_kept(steps: int) -> int:
    """Numbers that graphs hold at the same time, at most, in a step of so many sub-batches."""
    case = Case(grad_cache_steps=steps, different_images=12)
    recipe = make_recipe(case)
    model = make_model(case, recipe)
    weights = {id(parameter) for parameter in model.parameters()}
    now, most = 0, 0

    def forget(size: int) -> None:
        nonlocal now
        now -= size

    def pack(tensor: Tensor) -> tuple[Kept, Tensor]:
        nonlocal now, most
        box, size = Kept(), 0 if id(tensor) in weights else tensor.numel()
        weakref.finalize(box, forget, size)
        now += size
        most = max(most, now)
        return box, tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[1]):
        BatchGradient(ParallelModel(model, CPU, recipe), recipe)(make_batch(case, World()), 0)
    assert now == 0
    return most


def test_graphs_exist_of_one_sub_batch_at_a_time() -> None:
    assert most_kept(6) < most_kept(3) / 1.6 < most_kept(1) / 4


@pytest.mark.parametrize("grad_cache_steps", [1, 3])
def test_captions_of_one_image_are_positives_of_one_another(grad_cache_steps: int) -> None:
    """Against the written-out formula in float64, also where the image stands in the batch twice."""
    case = Case(captions_per_image=3, different_images=9, grad_cache_steps=grad_cache_steps, double=True)
    recipe = make_recipe(case)
    model, batch = make_model(case, recipe).eval(), make_batch(case, World())
    found = BatchGradient(ParallelModel(model, CPU, recipe), recipe)(batch, 0).terms["contrastive"]
    output = forward(model, batch)
    assert output.image_embed is not None
    assert output.text_embed is not None
    logits = (output.logit_scale * output.image_embed @ output.text_embed.T).detach()
    # Each image is encoded once, and has three texts in a row.
    assert logits.shape == (len(batch.sample_ids), 3 * len(batch.sample_ids))
    image_of_text = batch.sample_ids.repeat_interleave(3)
    losses = []
    for row, column in (batch.sample_ids[:, None] == image_of_text).nonzero().tolist():
        pair = logits[row, column].exp()
        other_texts = logits[row, image_of_text != batch.sample_ids[row]].exp().sum()
        other_images = logits[batch.sample_ids != image_of_text[column], column].exp().sum()
        losses += [((pair + other_texts) / pair).log(), ((pair + other_images) / pair).log()]
    assert len(losses) > 2 * len(image_of_text)  # some images stand in the batch twice
    assert torch.allclose(found, torch.stack(losses).mean(), rtol=1e-12)
