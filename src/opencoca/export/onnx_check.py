"""Checks that exported graphs compute what the model computes: ONNX Runtime against PyTorch, number by number.

Letters: I images, B texts, T words of a text, V vocabulary.
"""

import importlib.resources
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opencoca.export.onnx import (
    DECODER_FILE,
    IMAGE_FILE,
    TEXT_FILE,
    as_float32,
    require_onnx,
    suppressed_ids,
)
from opencoca.generation import GenerationOptions, generate
from opencoca.inference.pipeline import Pipeline
from opencoca.inference.preprocess import ImageLike
from opencoca.model.coca import CoCa
from opencoca.model.traceable import empty_cache

TOLERANCE = 1e-4
_TEXTS = ("a dog", "two children are playing in the water at the beach", "A man in a red jacket climbs a rock .", "")
_MAX_NEW_TOKENS = 30


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of one output between ONNX Runtime and PyTorch, and on what input."""

    output: str
    input: str
    value: float


@dataclass(frozen=True)
class CheckReport:
    """The differences of all outputs, and the positions of the images whose greedy captions differ."""

    differences: tuple[Difference, ...]
    captions_differ: tuple[int, ...]
    num_captions: int

    def passed(self, tolerance: float = TOLERANCE) -> bool:
        """Whether everything agrees; a difference of NaN does not."""
        return not self.captions_differ and all(found.value <= tolerance for found in self.differences)


class OnnxModel:
    """The graphs of a folder in ONNX Runtime, on the CPU; tensors in, tensors out."""

    def __init__(self, folder: str | os.PathLike[str], threads: int = 0):
        require_onnx()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self._sessions = {
            name: onnxruntime.InferenceSession(Path(folder) / name, options, providers=["CPUExecutionProvider"])
            for name in (IMAGE_FILE, TEXT_FILE, DECODER_FILE)
        }

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes pixels (I, 3, height, width): image tokens, image embedding, image cache."""
        tokens, embed, cache = self._run(IMAGE_FILE, pixels)
        return tokens, embed, cache

    def encode_text(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        return self._run(TEXT_FILE, token_ids, token_mask)[0]

    def decode_step(
        self, token_ids: Tensor, caches: Sequence[Tensor], image_cache: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the logits (B, V) and the two new caches."""
        logits, *caches = self._run(DECODER_FILE, token_ids, *caches, image_cache)
        return logits, caches

    def _run(self, file: str, *inputs: Tensor) -> list[Tensor]:
        session = self._sessions[file]
        names = (node.name for node in session.get_inputs())
        arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(np.asarray(array)) for array in session.run(None, arrays)]


@torch.inference_mode()
def check_onnx(
    pipeline: Pipeline, folder: str | os.PathLike[str], images: Sequence[ImageLike] = (), seed: int = 0
) -> CheckReport:
    """Compares the graphs in a folder with the model that they were exported from.

    Random inputs are pixels, texts of every length up to the context's, words one at a time and several at once. Real
    ones are photographs (two that come with the package, if none are given), texts, and greedy captions.

    Raises:
        ValueError: the extra ``onnx`` is not installed; ImageError for an image.
    """
    graphs = OnnxModel(folder)
    model = as_float32(pipeline.model)
    pipeline = Pipeline(model, pipeline.tokenizer, pipeline.preprocess)
    generator = torch.Generator().manual_seed(seed)
    random_pixels = torch.randn(3, 3, *pipeline.preprocess.config.image_size, generator=generator)
    photographs = pipeline.preprocess(images or sample_photographs())
    batches = {"random": random_pixels, "photographs": photographs}
    differences = []
    for name, pixels in batches.items():
        differences += _check_images(model, graphs, pixels, name)
        differences += _check_decoder(model, graphs, pixels, _random_ids(model, len(pixels), generator), name)
    differences += _check_texts(pipeline, graphs, generator)
    wrong = _wrong_captions(pipeline, graphs, photographs)
    return CheckReport(tuple(differences), tuple(wrong), len(photographs))


def sample_photographs() -> list[bytes]:
    """Returns two photographs in the public domain, as the bytes of their files."""
    folder = importlib.resources.files("opencoca").joinpath("assets", "photos")
    return [folder.joinpath(name).read_bytes() for name in ("cat.jpg", "rocket.jpg")]


def _check_images(model: CoCa, graphs: OnnxModel, pixels: Tensor, name: str) -> list[Difference]:
    expected = model.encode_image(pixels)
    tokens, embed, _ = graphs.encode_image(pixels)
    alone = graphs.encode_image(pixels[:1])
    return [
        _difference("image_tokens", name, tokens, expected.tokens),
        _difference("image_embed", name, embed, expected.embed),
        _difference("image_embed", f"{name}, one image", alone[1], expected.embed[:1]),
    ]


def _check_texts(pipeline: Pipeline, graphs: OnnxModel, generator: torch.Generator) -> list[Difference]:
    model, context_length = pipeline.model, pipeline.model.config.text.context_length
    ids = _random_ids(model, context_length, generator)
    mask = torch.arange(context_length) <= torch.arange(context_length)[:, None]
    real = pipeline.tokenizer(_TEXTS, context_length)
    found = []
    for name, token_ids, token_mask in (("random", ids, mask), ("captions", *real)):
        expected = model.encode_text(token_ids, token_mask).embed
        found.append(_difference("text_embed", name, graphs.encode_text(token_ids, token_mask), expected))
    return found


def _check_decoder(model: CoCa, graphs: OnnxModel, pixels: Tensor, token_ids: Tensor, name: str) -> list[Difference]:
    """Compares the decoder on token_ids (I, T): half of them in a first step, the others one at a time."""
    expected = model.logits(pixels, token_ids)
    image_cache = graphs.encode_image(pixels)[2]
    half = token_ids.shape[1] // 2
    found = []
    for first, kind in ((1, "from the first word"), (half, "after a prompt")):
        caches = [empty_cache(model, len(pixels), which) for which in ("unimodal", "multimodal")]
        steps = []
        for end in range(first, token_ids.shape[1] + 1):
            logits, caches = graphs.decode_step(token_ids[:, :end], caches, image_cache)
            steps.append(logits)
        found.append(_difference("logits", f"{name}, {kind}", torch.stack(steps, dim=1), expected[:, first - 1 :]))
    return found


def _wrong_captions(pipeline: Pipeline, graphs: OnnxModel, pixels: Tensor) -> list[int]:
    model, tokenizer = pipeline.model, pipeline.tokenizer
    expected = generate(model, model.encode_image(pixels).tokens, tokenizer, GenerationOptions(_MAX_NEW_TOKENS))
    image_cache = graphs.encode_image(pixels)[2]
    prompt = tokenizer.encode("")[:-1]
    ids = torch.tensor(prompt).repeat(len(pixels), 1)
    caches = [empty_cache(model, len(pixels), half) for half in ("unimodal", "multimodal")]
    forbidden = suppressed_ids(tokenizer, model.config.text.vocab_size)
    for _ in range(min(_MAX_NEW_TOKENS, model.config.text.context_length - len(prompt))):
        logits, caches = graphs.decode_step(ids, caches, image_cache)
        logits[:, forbidden] = -torch.inf
        ids = torch.cat((ids, logits.argmax(dim=1, keepdim=True)), dim=1)
    pairs = enumerate(zip(ids.tolist(), expected, strict=True))
    return [
        position for position, (row, (caption,)) in pairs if row[: len(caption.token_ids)] != list(caption.token_ids)
    ]


def _random_ids(model: CoCa, batch_size: int, generator: torch.Generator) -> Tensor:
    text = model.config.text
    return torch.randint(0, text.vocab_size, (batch_size, text.context_length), generator=generator)


def _difference(output: str, name: str, found: Tensor, expected: Tensor) -> Difference:
    assert found.shape == expected.shape, (output, found.shape, expected.shape)
    return Difference(output, name, float((found - expected).abs().max()))
