"""Imports and exports open_clip's CoCa: its configuration and its weights.

An imported model computes open_clip's embeddings, next-word logits, temperature and greedy captions. An exported one
has, tensor by tensor, the bytes that were imported.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opencoca.data.transforms import PreprocessConfig
from opencoca.model.coca import CoCa
from opencoca.model.init import without_values
from opencoca.store.interop.checkpoint_files import read_checkpoint
from opencoca.store.interop.open_clip_config import (
    config_from_open_clip,
    config_to_open_clip,
    preprocess_from_open_clip,
    preprocess_to_open_clip,
)
from opencoca.store.interop.open_clip_options import CONFIG_FILE, read_config
from opencoca.store.interop.open_clip_tensors import tensor_maps
from opencoca.store.model_folder import check_depth, check_image_size
from opencoca.store.safetensors_file import TensorInfo, differences, listed_names, non_finite, write_tensors
from opencoca.system.files import write_json
from opencoca.system.messages import brief
from opencoca.tokenizer import Tokenizer

WEIGHTS_FILE = "open_clip_model.safetensors"
"""The name under which open_clip finds the weights in a folder (``local-dir:``)."""


class OpenClipModel(NamedTuple):
    """An imported model in eval mode, with its tokenizer and its preprocessing."""

    model: CoCa
    tokenizer: Tokenizer
    preprocess: PreprocessConfig


class OpenClipExport(NamedTuple):
    """The state dict of open_clip's CoCa, and the options that open_clip builds it with (``model_cfg``)."""

    state_dict: dict[str, Tensor]
    config: dict[str, Any]


def load_open_clip(
    name_or_json: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    dtype: torch.dtype | None = torch.float32,
) -> OpenClipModel:
    """Loads open_clip's CoCa with the weights of a file, on the CPU, in eval mode.

    Weights that need no change are the file's own memory-mapped pages: do not write into the file while the model is
    in use.

    Args:
        name_or_json: a name of `CONFIGS`, a JSON file with open_clip's options, or a folder with open_clip_config.json.
        checkpoint: .pt, .bin or .safetensors; a state dict or a training checkpoint. No code in it is run.
        dtype: floating-point type of the weights, None for the stored one.

    Raises:
        FileNotFoundError: the configuration or the checkpoint is not there.
        ValueError: an option is not supported; the file is damaged; a tensor is missing, unknown, of another shape or
            not finite. The message names it.
    """
    read = read_config(name_or_json)
    try:
        config, preprocess = config_from_open_clip(read.model), preprocess_from_open_clip(read)
        check_image_size(config, preprocess)
    except ValueError as error:
        raise ValueError(f"{os.fspath(name_or_json)}: {brief(error, 200)}") from error
    tokenizer = Tokenizer.clip()
    if config.text.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"open_clip's option text_cfg.vocab_size = {config.text.vocab_size} is not supported here: CLIP's "
            f"vocabulary, which it is used with, has {tokenizer.vocab_size} ids"
        )
    stored = read_checkpoint(checkpoint)
    try:
        check_depth(config, len(stored))
    except ValueError as error:
        raise ValueError(f"{checkpoint} does not hold the weights of this open_clip model: {error}") from error
    with without_values():
        model = CoCa(config)
    tensors = convert_state_dict(stored, model, str(Path(checkpoint)))
    tensors = {name: _cast(tensor, dtype) for name, tensor in tensors.items()}
    # open_clip limits the temperature in training alone.
    scale = math.exp(min(float(tensors["log_logit_scale"]), 80.0))
    model.config = replace(config, max_logit_scale=max(config.max_logit_scale, scale))
    model.load_state_dict(tensors, assign=True)
    return OpenClipModel(model.requires_grad_().eval(), tokenizer, preprocess)


def convert_state_dict(state_dict: Mapping[str, Tensor], model: CoCa, label: str) -> dict[str, Tensor]:
    """Converts open_clip's tensors to the names and shapes of a model, which may be without values.

    Most of the result are views of the given tensors. label: what errors call them, such as the file's name.

    Raises ValueError that names the tensors that are missing, unknown, of another shape or type, or not finite.
    """
    maps, ours = tensor_maps(model.config), model.state_dict()
    assert {name for part in maps for name in part.ours} == ours.keys()
    expected = {name: tensor for part in maps for name, tensor in part.to_theirs(ours)}
    given = dict(state_dict)
    if "logit_scale" in given and given["logit_scale"].shape == (1,):  # their option nonscalar_logit_scale
        given["logit_scale"] = given["logit_scale"][0]
    _check(given, expected, label)
    return {name: tensor for part in maps for name, tensor in part.to_ours(given)}


def export_open_clip(model: CoCa) -> OpenClipExport:
    """Returns the weights and options with which open_clip builds a model of the same outputs.

    Raises ValueError that names the fields in which the model differs from everything open_clip can build.
    """
    options = config_to_open_clip(model.config)
    ours = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    theirs = {name: tensor for part in tensor_maps(model.config) for name, tensor in part.to_theirs(ours)}
    return OpenClipExport({name: tensor.contiguous() for name, tensor in theirs.items()}, options)


def save_open_clip_folder(folder: str | os.PathLike[str], model: CoCa, preprocess: PreprocessConfig) -> list[Path]:
    """Writes a folder for ``open_clip.create_model("local-dir:FOLDER")``; returns its files, the weights last.

    Raises:
        ValueError: as `export_open_clip`; nothing is written then.
        WriteError: (an OSError) the disk is full or the folder not writable.
    """
    state_dict, options = export_open_clip(model)
    config = {"model_cfg": options, "preprocess_cfg": preprocess_to_open_clip(preprocess)}
    files = [Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE]
    write_json(files[0], config)
    write_tensors(files[1], state_dict)
    return files


def _check(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], label: str) -> None:
    found = {name: TensorInfo.of(tensor) for name, tensor in given.items()}
    # The numbers themselves are read only when their sizes are known to be right.
    listed = differences(expected, found) or listed_names({"not finite": non_finite(given)})
    if listed:
        raise ValueError(f"{label} does not hold the weights of this open_clip model: {listed}")


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    # Single numbers keep full precision: rounding the temperature would change the outputs and save nothing.
    if dtype is None:
        return tensor
    return tensor.to(dtype if tensor.ndim else torch.promote_types(dtype, torch.float32))
