"""The state of a run in one safetensors file, written atomically: nothing in it can run code, nothing is half written.

Tensors: model/NAME, average/NAME, optimizer/KEY/NAME, rng/cpu and rng/cuda; everything else is JSON in the header.
"""

import errno
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from opencoca.files import atomic_write
from opencoca.train.optimizer import WeightAverage


@dataclass
class TrainState:
    """What training changes: the objects, and the progress (plain JSON types) that goes with them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    progress: dict[str, Any]


def save_checkpoint(path: Path, state: TrainState) -> None:
    """Writes everything that continuing bit-identically needs. Raises OSError if it can't; the old file stays."""
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    tensors: dict[str, Tensor] = {f"model/{name}": tensor for name, tensor in _unique_tensors(state.model).items()}
    if state.average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in state.average.state().items()}
    for parameter, values in state.optimizer.state.items():
        tensors |= {f"optimizer/{key}/{names[id(parameter)]}": torch.as_tensor(value) for key, value in values.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    header = {"progress": state.progress, "average_updates": state.average.updates if state.average else 0}
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    with atomic_write(path) as partial:
        try:
            save_file(tensors, partial, {"opencoca": json.dumps(header)})
        except SafetensorError as error:
            code = _disk_error(str(error))
            raise OSError(code, os.strerror(code)) from error


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Puts a checkpoint's content into the state's objects. Raises ValueError if it is damaged or of another run."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["opencoca"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            progress = dict(header["progress"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged or not one of a training run ({error}); restore it from a copy, or "
            "delete it to begin the run anew"
        ) from error
    try:
        with torch.no_grad():
            for name, tensor in _unique_tensors(state.model).items():
                _copy(tensors[f"model/{name}"], tensor)
        if state.average is not None:
            prefix = "average/"
            averages = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            state.average.load(averages, header["average_updates"])
        _load_optimizer(state, tensors)
        torch.set_rng_state(tensors["rng/cpu"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"checkpoint {path} does not fit this recipe's model ({error}); choose another --output, or delete it to "
            "begin the run anew"
        ) from error
    if torch.cuda.is_available() and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    state.progress.clear()
    state.progress.update(progress)


def _disk_error(message: str) -> int:
    code = re.search(r"os error (\d+)", message)
    return int(code.group(1)) if code else errno.EIO


def _load_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    parameters = dict(state.model.named_parameters())
    loaded: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, slot, name = key.split("/", 2)
            if tensor.ndim and tensor.shape != parameters[name].shape:
                raise RuntimeError(f"{key} has the shape {tuple(tensor.shape)}")
            loaded.setdefault(name, {})[slot] = tensor.to(parameters[name].device)
    slots = {slot for values in loaded.values() for slot in values}
    state.optimizer.state.clear()
    for name, values in loaded.items():
        if missing := slots - values.keys():
            raise KeyError(f"optimizer/{missing.pop()}/{name}")
        state.optimizer.state[parameters[name]] = values


def _copy(source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:  # copy_ would spread it out
        raise RuntimeError(f"a tensor of shape {tuple(source.shape)} where {tuple(target.shape)} is needed")
    target.copy_(source)


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each storage once (a tied head is its embedding)."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
