"""Reads and writes model folders: config.json, model.safetensors and tokenizer.json."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opencoca.data.transforms import PreprocessConfig
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.model.init import without_values
from opencoca.store.quantization import INT8, is_quantized, quantize
from opencoca.store.safetensors_file import (
    differences,
    first_names,
    listed_names,
    non_finite,
    read_tensor_infos,
    read_tensors,
    write_tensors,
)
from opencoca.system.files import write_json, write_text
from opencoca.system.json_files import read_json
from opencoca.system.messages import brief, shown
from opencoca.tokenizer import Tokenizer

FORMAT = "opencoca-1"
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
# Far more than any real config.json has; parsing a longer file would take many seconds before it is refused.
_MAX_CONFIG_BYTES = 4_000_000
# The fewest tensors that a layer has; how much larger than the network's own its images may be, on a side.
_TENSORS_OF_LAYER, _MAX_IMAGE_RATIO = 4, 4
_CONTENTS = f"a model's folder holds {CONFIG_FILE}, {WEIGHTS_FILE} and {TOKENIZER_FILE}"


@dataclass(frozen=True)
class LoadedModel:
    """The content of a model folder: the network (in eval mode), its tokenizer, its preprocessing, and its info.

    task: what a task needs beside the network, such as the names of its classes; None for a model of no single task.
    """

    model: CoCa
    tokenizer: Tokenizer
    preprocess: PreprocessConfig
    info: dict[str, Any]
    task: dict[str, Any] | None = None


def save_model_folder(
    folder: str | os.PathLike[str],
    model: CoCa,
    tokenizer: Tokenizer,
    preprocess: PreprocessConfig,
    *,
    dtype: torch.dtype | None = None,
    info: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model folder and creates it if needed; each file is replaced in one step, the weights last.

    Args:
        dtype: floating-point type of the stored weights; None keeps the model's. Single numbers, such as the
            temperature, are never cast: it would save nothing, and their rounding would change the outputs.
        info: facts about the model that JSON can hold: its origin, its scores.
        task: see `LoadedModel`.

    Raises:
        ValueError: a weight is not finite, or not in `dtype`; the tokenizer has more ids than the model; the image
            encoder is a module that was handed over, which no folder describes.
        WriteError: (an OSError) the disk is full or the folder is not writable; the old file stays as it was.
    """
    _check_vocabulary(model.config, tokenizer, "this tokenizer")
    if model.config.image.name == "custom":
        raise ValueError("a folder cannot describe an image encoder of your own; store model.state_dict() instead")
    tensors = model.stored_weights()
    tensors = {name: cast_weight(tensor.detach(), dtype).cpu().contiguous() for name, tensor in tensors.items()}
    if broken := non_finite(tensors):
        kind = f" in {dtype}" if dtype is not None else ""
        raise ValueError(f"the model was not saved: these weights are not finite{kind}: {first_names(broken)}")
    config = {
        "format": FORMAT,
        "model": model.config.to_dict(),
        "preprocess": preprocess.to_dict(),
        "info": dict(info or {}),
    }
    if is_quantized(model):
        config["quantization"] = INT8
    if task is not None:
        config["task"] = dict(task)
    folder = Path(folder)
    write_text(folder / TOKENIZER_FILE, tokenizer.to_json())
    write_json(folder / CONFIG_FILE, config)
    write_tensors(folder / WEIGHTS_FILE, tensors)


def load_model_folder(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Reads a model folder. Every weight is checked, and none is in memory twice.

    Names, shapes and types are compared before the weights are read. On the CPU and in the stored type the weights
    are the file's own pages, memory-mapped: do not write into the file while they are in use (`save_model_folder`,
    which replaces it, may).

    Args:
        device: where the model goes.
        dtype: floating-point type of its weights (single numbers excepted), None for the stored one.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: a file is damaged, of another format, or the weights are not those of the configuration.
    """
    folder = Path(folder)
    _check_files(folder)
    weights, config_file, tokenizer_file = (folder / name for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE))
    stored = read_tensor_infos(weights)
    config, rest, quantization = _read_config(config_file, len(stored))
    tokenizer = Tokenizer.load(tokenizer_file)
    _check_vocabulary(config, tokenizer, str(tokenizer_file))
    with _named(config_file):
        with without_values():
            model = CoCa(config)
        _quantize_as_stored(model, quantization)
    _check_same(weights, differences(model.stored_weights(), stored))
    names = model.state_dict().keys()
    if not all(name in names for name, _ in model.named_buffers()):
        # Some timm backbones have tables that are computed and not stored; they exist only after a real build.
        model = CoCa(config)
        _quantize_as_stored(model, quantization)
    tensors = read_tensors(weights, str(device))
    for name in tuple(tensors):
        tensors[name] = cast_weight(tensors[name], dtype)
    _check_same(weights, listed_names({"not finite": non_finite(tensors)}))
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_head()
    return LoadedModel(model.to(device).eval(), tokenizer, *rest)


def read_description(folder: str | os.PathLike[str]) -> tuple[CoCaConfig, PreprocessConfig]:
    """The architecture and the preprocessing of the model in a folder. Raises as `load_model_folder` does."""
    folder = Path(folder)
    _check_files(folder)
    file = folder / CONFIG_FILE
    stored = _read_stored(file)
    with _named(file):
        return CoCaConfig.from_dict(stored["model"]), PreprocessConfig.from_dict(stored["preprocess"])


def stored_format(config_file: str | os.PathLike[str]) -> str | None:
    """Returns the format that a config.json names; None if it names none, as another project's."""
    try:
        stored = read_json(Path(config_file), _MAX_CONFIG_BYTES)
    except ValueError:
        return None
    found = stored.get("format") if isinstance(stored, dict) else None
    return found if isinstance(found, str) else None


def check_depth(config: CoCaConfig, num_tensors: int) -> None:
    """Refuses, before anything is built, a configuration with more layers than the weights can be of.

    Raises ValueError.
    """
    layers = config.text.unimodal_depth + config.text.multimodal_depth
    layers += config.image.depth if config.image.name == "vit" else 0
    if layers * _TENSORS_OF_LAYER > num_tensors:
        raise ValueError(f"the configuration asks for {layers} layers, but there are {num_tensors} tensors")


def check_image_size(config: CoCaConfig, preprocess: PreprocessConfig) -> None:
    """Raises ValueError for images that the network cannot take, or far larger than those that it is made for."""
    image, size = config.image, preprocess.image_size
    if any(side > _MAX_IMAGE_RATIO * own for side, own in zip(size, image.image_size, strict=True)):
        raise ValueError(f"images of {size} pixels are far larger than those of the network, {image.image_size}")
    if image.name == "vit" and any(side % image.patch_size for side in size):
        raise ValueError(f"patch_size {image.patch_size} of the network does not divide images of {size} pixels")


def _check_files(folder: Path) -> None:
    if not folder.exists():
        raise FileNotFoundError(f"there is no model folder {folder}; {_CONTENTS}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file, not a model's folder; give the folder: {_CONTENTS}")
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}; {_CONTENTS}")


class _Rest(NamedTuple):
    """What config.json says beside the network."""

    preprocess: PreprocessConfig
    info: dict[str, Any]
    task: dict[str, Any] | None


def _read_config(file: Path, num_tensors: int) -> tuple[CoCaConfig, _Rest, Any]:
    """The network's configuration, what else the file says, and how the weights are quantized."""
    stored = _read_stored(file)
    with _named(file):
        config, preprocess = CoCaConfig.from_dict(stored["model"]), PreprocessConfig.from_dict(stored["preprocess"])
        check_depth(config, num_tensors)
        check_image_size(config, preprocess)
        if not re.fullmatch(r"(timm:)?[\w.-]+", config.image.name):
            # timm also accepts names that make it read other folders or download.
            raise ValueError(f"the image encoder's name {shown(config.image.name, 60)} is more than a name")
        task = stored.get("task")
        _check_classes(config, task)
        return config, _Rest(preprocess, dict(stored["info"]), task and dict(task)), stored.get("quantization")


def _check_classes(config: CoCaConfig, task: Any) -> None:
    """A task's classes, where it has them, are names, each once, and as many as the outputs of the network's head."""
    classes = task.get("classes") if task else None
    if classes is None:
        return
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"the task's classes {shown(classes, 60)} are no list of names")
    outputs, different = 0 if config.head is None else config.head.num_outputs, len(set(classes))
    if different != len(classes) or different != outputs:
        raise ValueError(
            f"the task has {different} different names of {len(classes)} classes, and the head {outputs} outputs"
        )


def _read_stored(file: Path) -> dict[str, Any]:
    stored = read_json(file, _MAX_CONFIG_BYTES)
    found = stored.get("format") if isinstance(stored, dict) else None
    if found != FORMAT:
        stated = shown(found, 60)
        raise ValueError(f"{file} is of format {stated}, but this version of opencoca reads {FORMAT!r} alone")
    return stored


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Names the configuration in errors of what it describes."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{file} is damaged: it has no entry {brief(error)}") from error
    except (ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{brief(file, 110)} describes no model that can be built: {brief(error, 140)}") from error


def _quantize_as_stored(model: CoCa, quantization: Any) -> None:
    if quantization not in (None, INT8):
        raise ValueError(
            f"its weights are quantized as {shown(quantization, 60)}, and this version of opencoca reads {INT8!r} alone"
        )
    if quantization == INT8:
        quantize(model)


def _check_same(file: Path, wrong: str) -> None:
    if wrong:
        raise ValueError(f"{file} does not hold the weights of the model in its {CONFIG_FILE}: {wrong}")


def _check_vocabulary(config: CoCaConfig, tokenizer: Tokenizer, name: str) -> None:
    if tokenizer.vocab_size > config.text.vocab_size:
        raise ValueError(
            f"{name} has {tokenizer.vocab_size} ids, more than the model's vocab_size {config.text.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def cast_weight(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The weight in a floating-point type; None, whole numbers and single numbers leave it as it is."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() and tensor.ndim else tensor
