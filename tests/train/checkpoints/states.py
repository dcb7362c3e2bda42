"""A small state of training, with everything that a checkpoint holds."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from opencoca.distributed.world import World
from opencoca.train.checkpoints import Checkpoints, TrainState
from opencoca.train.checkpoints.reader import CheckpointReader
from opencoca.train.optim.optimizer import WeightAverage
from opencoca.train.recipe.safety import CheckpointRecipe

Everything = dict[str, Tensor]


def make_state(seed: int = 0) -> TrainState:
    """Of a model with a buffer and a parameter that is not trained; its optimizer has no state yet."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    model[2].bias.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)
    progress = {"step": 0, "best": None, "best_step": 0, "window": {"rows": []}}
    return TrainState(model, optimizer, WeightAverage(model, 0.9), progress)


def take_steps(state: TrainState, count: int = 1) -> None:
    """With random numbers from the generator that a checkpoint stores."""
    assert state.average is not None
    for _ in range(count):
        state.optimizer.zero_grad()
        state.model(torch.randn(4, 5)).square().sum().backward()
        state.optimizer.step()
        state.average.update()
        state.progress["step"] += 1
        state.progress["window"]["rows"].append({"loss": 0.1 * state.progress["step"]})


def everything(state: TrainState) -> Everything:
    """All that continuing depends on; a copy."""
    assert state.average is not None
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    found = {f"model/{name}": tensor for name, tensor in state.model.state_dict().items()}
    found |= {f"average/{name}": tensor for name, tensor in state.average.state().items()}
    for parameter, values in state.optimizer.state.items():
        found |= {f"{slot}/{names[id(parameter)]}": value for slot, value in values.items()}
    found["updates"] = torch.tensor(state.average.updates)
    found["step"] = torch.tensor(state.progress["step"])
    found["rows"] = torch.tensor([row["loss"] for row in state.progress["window"]["rows"]])
    found["random"] = torch.get_rng_state()
    return copy.deepcopy({name: tensor.detach() for name, tensor in found.items()})


def equal(first: Everything | None, second: Everything | None) -> bool:
    """To the last bit; None equals nothing."""
    if first is None or second is None:
        return False
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def checkpoints(folder: Path, **options: object) -> Checkpoints:
    return Checkpoints(folder, CheckpointRecipe(**options), World())  # pyright: ignore[reportArgumentType]


def save(folder: Path, state: TrainState, **options: object) -> None:
    saver = checkpoints(folder, **options)
    saver.save(state)
    saver.finish()


def resumed(folder: Path) -> Everything | None:
    """The state that a new process would continue from."""
    state = make_state(seed=99)
    return None if checkpoints(folder).resume(state) is None else everything(state)


def reader(folder: Path, name: str) -> CheckpointReader:
    return CheckpointReader(folder / "checkpoints" / name)
