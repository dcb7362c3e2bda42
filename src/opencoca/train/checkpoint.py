"""The state of a run in one safetensors file, written atomically: nothing in it can run code, nothing is half written.

Tensors: model/NAME, average/NAME, optimizer/KEY/NAME, rng/cpu and rng/cuda; everything else is JSON in the header.
"""

import errno
import json
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
    names = _parameter_names(state.model)
    tensors: dict[str, Tensor] = {f"model/{name}": tensor for name, tensor in _unique_tensors(state.model).items()}
    if state.average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in state.average.state().items()}
    for parameter, values in state.optimizer.state.items():
        tensors |= {f"optimizer/{key}/{names[parameter]}": torch.as_tensor(value) for key, value in values.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    header = {"progress": state.progress, "average_updates": state.average.updates if state.average else 0}
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    with atomic_write(path) as partial:
        try:
            save_file(tensors, partial, {"opencoca": json.dumps(header)})
        except SafetensorError as error:
            raise OSError(_disk_error(str(error)), str(error)) from error


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Puts a checkpoint's content into the state's objects. Raises ValueError if the file is damaged or of another run."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["opencoca"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint {path} is damaged or not one of a training run: {error}") from error
    try:
        with torch.no_grad():
            for name, tensor in _unique_tensors(state.model).items():
                tensor.copy_(tensors[f"model/{name}"])
        if state.average is not None:
            prefix = "average/"
            averages = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            state.average.load(averages, header["average_updates"])
        _load_optimizer(state, tensors)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"checkpoint {path} does not fit this recipe's model: {error}") from error
    torch.set_rng_state(tensors["rng/cpu"])
    if torch.cuda.is_available() and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    state.progress.clear()
    state.progress.update(header["progress"])


def _disk_error(message: str) -> int:
    code = re.search(r"os error (\d+)", message)
    return int(code.group(1)) if code else errno.EIO


def _load_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    parameters = {name: parameter for parameter, name in _parameter_names(state.model).items()}
    state.optimizer.state.clear()
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, slot, name = key.split("/", 2)
            parameter = parameters[name]
            value = tensor if slot == "step" else tensor.to(parameter.device)
            state.optimizer.state[parameter][slot] = value


def _parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each storage once (a tied head is its embedding)."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
