"""From a run's objects to the rows that each process writes, and back, also into another number of processes.

Tensors: model/NAME, average/NAME, optimizer/SLOT/NAME. Weights that FSDP shards are written by those that hold them;
what all processes have alike is shared out among them by size. Every process adds random/RANK/NAME.
"""

import heapq
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from opencoca.distributed.world import World, local_part
from opencoca.train.checkpoints.index import Layout
from opencoca.train.checkpoints.random_state import random_state, set_random_state
from opencoca.train.checkpoints.reader import CheckpointReader
from opencoca.train.optim.optimizer import WeightAverage


@dataclass
class TrainState:
    """What training changes: the objects, and the progress (plain JSON types) that goes with them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    progress: dict[str, Any]


class Snapshot(NamedTuple):
    """The state at one moment: this process's tensors, on the CPU, and what the index says of it."""

    tensors: dict[str, Tensor]
    layouts: dict[str, Layout]
    progress: dict[str, Any]
    average_updates: int


def take_snapshot(state: TrainState, world: World, copy: bool) -> Snapshot:
    """Takes this process's part of the state.

    copy: copies tensors that are on the CPU, so that training may go on before they are written.
    """
    tensors = _named_tensors(state)
    layouts = _layouts(tensors, {f"model/{name}" for name, _ in state.model.named_buffers()}, world)
    own = {}
    for key, layout in layouts.items():
        if world.rank in layout.ranks:
            start, stop = layout.rows(layout.ranks.index(world.rank))
            part = local_part(tensors[key].detach())
            assert not layout.shape or len(part) == stop - start, key
            if part.numel():
                own[key] = part
    cuda = {key for key, part in own.items() if part.is_cuda}
    for key, part in own.items():
        if key in cuda:
            pinned = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
            own[key] = pinned.copy_(part, non_blocking=True)
        elif copy:
            own[key] = part.clone(memory_format=torch.contiguous_format)
    if cuda:
        torch.cuda.synchronize()
    own |= {f"random/{world.rank}/{name}": value for name, value in random_state().items()}
    updates = state.average.updates if state.average else 0
    return Snapshot(own, layouts, json.loads(json.dumps(state.progress)), updates)


def restore(state: TrainState, reader: CheckpointReader, world: World) -> None:
    """Puts a stored state into the run's objects, all but its progress. Every process reads its own part of it.

    Raises KeyError, RuntimeError, TypeError or ValueError if it does not fit them.
    """
    with torch.no_grad():
        for name, tensor in _model_tensors(state.model).items():
            _fill(tensor, reader, f"model/{name}")
        if state.average is not None:
            for name, tensor in state.average.state().items():
                _fill(tensor, reader, f"average/{name}")
            state.average.updates = reader.average_updates
        _restore_optimizer(state, reader)
    if stored := reader.random_state(world.rank):  # none if there were fewer processes
        set_random_state(stored)


def _named_tensors(state: TrainState) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    tensors = {f"model/{name}": tensor for name, tensor in _model_tensors(state.model).items()}
    if state.average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in state.average.state().items()}
    for parameter, values in state.optimizer.state.items():
        for slot, value in values.items():
            if value is not None:
                tensors[f"optimizer/{slot}/{names[id(parameter)]}"] = torch.as_tensor(value)
    return tensors


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each storage once (a tied head is its embedding)."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _layouts(tensors: dict[str, Tensor], of_main: set[str], world: World) -> dict[str, Layout]:
    """Decides who writes each tensor, alike in every process; of_main: those that the main one writes (buffers)."""
    loads = [(0, rank) for rank in range(world.size)]
    found = {}
    for number, (key, tensor) in enumerate(sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0]))):
        rows = _rows_of_mesh(tensor)
        if rows:
            ranks = tuple(rows[number % len(rows)])
        elif key in of_main:
            ranks = (0,)
        else:
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + tensor.numel() * tensor.element_size(), rank))
            ranks = (rank,)
        found[key] = Layout(tuple(tensor.shape), ranks)
    return found


def _rows_of_mesh(tensor: Tensor) -> list[list[int]]:
    """Groups of processes that hold one copy of a sharded tensor together, each; none if it is not sharded."""
    if not isinstance(tensor, DTensor) or all(isinstance(placement, Replicate) for placement in tensor.placements):
        return []
    *outer, last = tensor.placements
    assert last == Shard(0), tensor.placements
    assert all(isinstance(placement, Replicate) for placement in outer), tensor.placements
    mesh = tensor.device_mesh.mesh
    return mesh.reshape(-1, mesh.shape[-1]).tolist()


def _own_rows(tensor: Tensor) -> tuple[int, int]:
    if not isinstance(tensor, DTensor) or not _rows_of_mesh(tensor):
        return 0, len(tensor)
    mesh = tensor.device_mesh
    layout = Layout(tuple(tensor.shape), tuple(range(mesh.size(mesh.ndim - 1))))
    return layout.rows(mesh.get_local_rank(mesh.ndim - 1))


def _fill(target: Tensor, reader: CheckpointReader, key: str) -> None:
    shape = reader.shape(key)
    if shape != target.shape:  # copy_ would spread it out
        raise RuntimeError(f"{key} has the shape {shape} where {tuple(target.shape)} is needed")
    local = local_part(target)
    if not shape:
        local.copy_(reader.read(key))
    elif local.numel():
        local.copy_(reader.rows(key, *_own_rows(target)))


def _restore_optimizer(state: TrainState, reader: CheckpointReader) -> None:
    parameters = dict(state.model.named_parameters())
    on_device = {
        id(parameter): bool(group.get("fused") or group.get("capturable"))
        for group in state.optimizer.param_groups
        for parameter in group["params"]
    }
    state.optimizer.state.clear()
    for key in sorted(reader.keys):
        if not key.startswith("optimizer/"):
            continue
        _, slot, name = key.split("/", 2)
        parameter = parameters[name]
        if id(parameter) not in on_device:
            raise KeyError(f"{name} is not trained")
        state.optimizer.state[parameter][slot] = _slot(reader, key, parameter, on_device[id(parameter)])


def _slot(reader: CheckpointReader, key: str, parameter: Tensor, on_device: bool) -> Tensor:
    """A part of the optimizer's state: laid out as its parameter if it has its shape, whole in each process if not."""
    shape = reader.shape(key)
    if not shape:  # a count of steps, which some optimizers keep on the CPU
        value = reader.read(key)
        return value.to(parameter.device) if on_device else value.clone()
    stored = reader.rows(key, 0, 0).dtype
    if shape == parameter.shape:
        value = torch.empty_like(parameter, dtype=stored, requires_grad=False)
    else:
        value = torch.empty(shape, dtype=stored, device=parameter.device)
    _fill(value, reader, key)
    return value
