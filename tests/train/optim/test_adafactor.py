"""Adafactor against the formulas of arXiv 1804.04235 in float64."""

import pytest
import torch
from torch import Tensor, nn

from opencoca.train.optim.adafactor import Adafactor


def reference(
    value: Tensor, grads: list[Tensor], lr: float, betas: tuple[float, float], decay: float, factored: bool
) -> Tensor:
    """The last value, with the first moment rounded to bf16 after each step."""
    rows, columns, squares = 0.0, 0.0, 0.0
    mean = torch.zeros_like(value)
    for step, grad in enumerate(grads, start=1):
        second = min(betas[1], 1 - step**-0.8)
        square = grad.square() + 1e-30
        if factored:
            rows = second * rows + (1 - second) * square.sum(1)
            columns = second * columns + (1 - second) * square.sum(0)
            moment = torch.outer(rows, columns) / rows.sum()
        else:
            squares = second * squares + (1 - second) * square
            moment = squares
        update = grad / moment.sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        mean = betas[0] * mean + (1 - betas[0]) * update
        value = value * (1 - lr * decay) - lr * mean
        mean = mean.to(torch.bfloat16).double()
    return value


@pytest.mark.parametrize("shape", [(40, 50), (33, 32), (40, 8), (20,), ()])
def test_steps_follow_the_formulas(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start = parameter.detach().clone()
    grads = [torch.randn(shape, dtype=torch.float64) * 10.0**-step for step in range(6)]
    optimizer = Adafactor([parameter], lr=0.01, betas=(0.9, 0.6), weight_decay=0.1)
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
    factored = len(shape) == 2 and min(shape) >= 32
    expected = reference(start, grads, 0.01, (0.9, 0.6), 0.1, factored)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)


def test_matrices_cost_rows_and_columns_and_half_a_first_moment() -> None:
    weight = nn.Parameter(torch.randn(256, 3, 8, 8))
    optimizer = Adafactor([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    assert state["row_mean_sq"].shape == (256,)
    assert state["column_mean_sq"].shape == (192,)
    assert state["exp_avg"].dtype == torch.bfloat16
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert size < 0.26 * 8 * weight.numel()


def test_state_survives_saving() -> None:
    torch.manual_seed(0)
    grads = torch.randn(6, 40, 40)

    def run(parameter: nn.Parameter, optimizer: Adafactor, some: Tensor) -> None:
        for grad in some:
            parameter.grad = grad
            optimizer.step()

    whole, halves = nn.Parameter(torch.ones(40, 40)), nn.Parameter(torch.ones(40, 40))
    run(whole, Adafactor([whole]), grads)
    first = Adafactor([halves])
    run(halves, first, grads[:3])
    second = Adafactor([halves])
    for key, value in first.state[halves].items():
        second.state[halves][key] = value.clone()
    run(halves, second, grads[3:])
    assert torch.equal(whole, halves)


def test_learns() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)), torch.randn(64, 32)
    optimizer = Adafactor(model.parameters(), lr=0.01)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(inputs) - inputs.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
