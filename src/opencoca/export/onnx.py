"""Writes a model as three ONNX graphs, into a folder that needs neither OpenCoCa nor PyTorch.

PyTorch's exporter needs onnx and onnxscript, and the check needs onnxruntime: the extra ``onnx`` installs them.
"""

import contextlib
import copy
import importlib.resources
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opencoca.data.transforms import PreprocessConfig
from opencoca.inference.pipeline import Pipeline
from opencoca.model.coca import CoCa
from opencoca.model.traceable import DecoderGraph, ImageGraph, TextGraph, empty_cache
from opencoca.store.quantization import dequantize, is_quantized
from opencoca.system.files import atomic_write, write_text
from opencoca.tokenizer import Tokenizer

FORMAT = "opencoca-onnx-1"
CONFIG_FILE, TOKENIZER_FILE, SCRIPT_FILE, README_FILE = "config.json", "tokenizer.json", "caption.py", "README.md"
IMAGE_FILE, TEXT_FILE, DECODER_FILE = "image_encoder.onnx", "text_encoder.onnx", "decoder_step.onnx"
# A protobuf file ends at 2 GiB; larger graphs keep their weights in a file beside them.
_MAX_SINGLE_FILE_BYTES = 1_900_000_000


@dataclass(frozen=True)
class Graph:
    """A graph, inputs to trace it with, and the names of its inputs, their varying axes and its outputs."""

    file: str
    module: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]


def export_onnx(pipeline: Pipeline, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes the graphs, the tokenizer, config.json, a README and a script that captions; returns the files.

    The graphs compute in float32, whatever the model's type. Each file is replaced in one step.

    Raises:
        ValueError: the extra ``onnx`` is not installed.
        WriteError: (an OSError) a file cannot be written.
    """
    require_onnx()
    folder = Path(folder)
    model = as_float32(pipeline.model)
    graphs = make_graphs(model, pipeline.preprocess.config)
    files = []
    for graph in graphs:
        files += _export(graph, folder)
    texts = {
        TOKENIZER_FILE: pipeline.tokenizer.to_json(),
        CONFIG_FILE: json.dumps(describe(pipeline, graphs), indent=2, ensure_ascii=False) + "\n",
        SCRIPT_FILE: _asset(SCRIPT_FILE),
        README_FILE: _asset(README_FILE),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
        files.append(folder / name)
    return files


def require_onnx() -> None:
    """Raises ValueError, with the remedy, unless everything that export and check need can be imported."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(f"{name} cannot be imported ({error}): pip install 'opencoca[onnx]'") from error


def make_graphs(model: CoCa, preprocess: PreprocessConfig) -> list[Graph]:
    """Makes the three graphs of a model, each with small inputs whose varying axes all differ from 0 and 1."""
    pixels = torch.zeros(2, 3, *preprocess.image_size)
    ids = torch.ones(2, 5, dtype=torch.int64)
    image = ImageGraph(model).eval()
    with torch.no_grad():
        image_cache = image(pixels)[2]
    unimodal = empty_cache(model, 2, "unimodal", past=3)
    multimodal = empty_cache(model, 2, "multimodal", past=3)
    cache_axes = {2: "texts", 4: "past"}
    return [
        Graph(
            IMAGE_FILE,
            image,
            {"pixels": pixels},
            {"pixels": {0: "images"}},
            ("image_tokens", "image_embed", "image_cache"),
        ),
        Graph(
            TEXT_FILE,
            TextGraph(model).eval(),
            {"token_ids": ids, "token_mask": ids > 0},
            {name: {0: "texts", 1: "length"} for name in ("token_ids", "token_mask")},
            ("text_embed",),
        ),
        Graph(
            DECODER_FILE,
            DecoderGraph(model).eval(),
            {
                "token_ids": ids,
                "unimodal_cache": unimodal,
                "multimodal_cache": multimodal,
                "image_cache": image_cache,
            },
            {
                "token_ids": {0: "texts", 1: "words"},
                "unimodal_cache": cache_axes,
                "multimodal_cache": cache_axes,
                "image_cache": {2: "texts"},
            },
            ("logits", "new_unimodal_cache", "new_multimodal_cache"),
        ),
    ]


def describe(pipeline: Pipeline, graphs: Sequence[Graph]) -> dict[str, Any]:
    """Returns the content of config.json: everything that one needs to use the graphs."""
    tokenizer, model = pipeline.tokenizer, pipeline.model
    halves = {half: list(empty_cache(model, 1, half).shape) for half in ("unimodal", "multimodal")}
    return {
        "format": FORMAT,
        "preprocess": pipeline.preprocess.config.to_dict(),
        "decoding": {
            "bos_id": tokenizer.bos_id,
            "prompt_ids": tokenizer.encode("")[:-1],
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
            "suppressed_ids": suppressed_ids(tokenizer, model.config.text.vocab_size),
            "context_length": model.config.text.context_length,
            "empty_unimodal_cache": halves["unimodal"],
            "empty_multimodal_cache": halves["multimodal"],
        },
        "logit_scale": float(model.logit_scale.detach()),
        "embed_dim": model.config.embed_size,
        "graphs": {
            graph.file: {
                "inputs": {name: _describe_input(name, tensor, graph) for name, tensor in graph.inputs.items()},
                "outputs": list(graph.outputs),
            }
            for graph in graphs
        },
        "info": pipeline.info,
    }


def suppressed_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Returns the ids that are no text; no caption may contain them, and caption generation forbids them too."""
    return [*tokenizer.ids_without_text, *range(tokenizer.vocab_size, vocab_size)]


def _describe_input(name: str, tensor: Tensor, graph: Graph) -> dict[str, Any]:
    shape = [graph.axes[name].get(axis, size) for axis, size in enumerate(tensor.shape)]
    return {"type": str(tensor.dtype).removeprefix("torch."), "shape": shape}


def as_float32(model: CoCa) -> CoCa:
    """Returns the model, or a float32 copy on the CPU if it is quantized, of another type or elsewhere."""
    if is_quantized(model):
        model = copy.deepcopy(model)
        dequantize(model)
    if all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in model.parameters()):
        return model
    return copy.deepcopy(model).to("cpu", torch.float32)


def _export(graph: Graph, folder: Path) -> list[Path]:
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in graph.module.state_dict().values())
    beside = num_bytes > _MAX_SINGLE_FILE_BYTES
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph.module,
            tuple(graph.inputs.values()),
            dynamo=True,
            dynamic_shapes=tuple(graph.axes[name] for name in graph.inputs),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
        assert program is not None
        path = folder / graph.file
        if beside:  # its name is written into the graph, so that it cannot be renamed afterwards
            folder.mkdir(parents=True, exist_ok=True)
            program.save(path, external_data=True)
            return [path, folder / f"{graph.file}.data"]
        with atomic_write(path) as partial:
            program.save(partial, external_data=False)
    return [path]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's remarks on its own workings: absent torchvision, renamed axes, deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _asset(name: str) -> str:
    return importlib.resources.files("opencoca").joinpath("assets", "onnx", name).read_text(encoding="utf-8")
