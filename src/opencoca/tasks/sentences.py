"""Sentences: the text tower learns from a sentence encoder which texts mean nearly the same.

A few thousand images come with a few ten thousand captions, which is little to learn from what words mean. A sentence
encoder has read a billion pairs of sentences. What it makes of many texts, captions of the training images or any
others, is computed once (scripts/embed_sentences.py) and stored in a file; in training the text tower's [CLS] vector
learns the direction of the sentence encoder's vector. The text projection after it is free to turn and stretch that
space for images (knowledge distillation, arXiv 1503.02531; of sentence vectors, arXiv 2004.09813).

Letters: N texts, D width of the text tower, S width of the sentence encoder's vectors.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opencoca.data.captions import collate_captions
from opencoca.model.coca import CoCa
from opencoca.store.safetensors_file import read_tensors, write_tensors
from opencoca.tokenizer import Tokenizer

_VECTORS, _TEXTS = "vectors", "texts"
_REMEDY = "make it with scripts/embed_sentences.py"


def write_sentences(path: Path, texts: list[str], vectors: Tensor) -> None:
    """Stores texts and their vectors (N, S), of which the directions count. Texts lose their line breaks."""
    lines = "\n".join(" ".join(text.split()) for text in texts).encode()
    written = torch.frombuffer(bytearray(lines), dtype=torch.uint8) if lines else torch.empty(0, dtype=torch.uint8)
    write_tensors(path, {_VECTORS: F.normalize(vectors.float(), dim=-1).half().contiguous(), _TEXTS: written})


def read_sentences(path: Path) -> tuple[list[str], Tensor]:
    """Returns the texts of a file that `write_sentences` wrote, and their vectors (N, S).

    Raises ValueError if it is none, FileNotFoundError if it is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; {_REMEDY}")
    tensors = read_tensors(path)
    vectors, written = tensors.get(_VECTORS), tensors.get(_TEXTS)
    if vectors is None or written is None or vectors.ndim != 2 or written.dtype != torch.uint8:
        raise ValueError(f"{path} is no file of sentences and their vectors; {_REMEDY}")
    try:
        texts = written.numpy().tobytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: its texts are not UTF-8 ({error.reason}); {_REMEDY}") from error
    if len(texts) != len(vectors):
        raise ValueError(f"{path} has {len(texts)} texts and {len(vectors)} vectors; {_REMEDY}")
    if not bool(vectors.isfinite().all()):
        raise ValueError(f"{path} has vectors with infinities or NaN; {_REMEDY}")
    return texts, vectors


class SentenceTeacher:
    """Texts with their vectors, of which some are drawn for each step.

    num_texts: how many are drawn.
    """

    def __init__(self, path: Path, network: CoCa, tokenizer: Tokenizer, num_texts: int):
        """Raises as `read_sentences`."""
        texts, vectors = read_sentences(path)
        length = network.config.text.context_length
        self._ids = [np.asarray(ids) for ids in tokenizer.encode_batch(texts, length)]
        self._vectors = _narrowed(vectors, network.config.text.width)
        self._pad_id, self.num_texts = tokenizer.pad_id, num_texts

    def loss(self, network: CoCa) -> Tensor:
        """The sum over the drawn texts of one minus the cosine of the tower's vector and the sentence encoder's.

        Vectors that are narrower than the tower's are compared with the first channels of it.
        """
        drawn = torch.randint(len(self._ids), (self.num_texts,))
        batch = collate_captions([self._ids[index] for index in drawn.tolist()], self._pad_id)
        token_ids, token_mask = (part.to(network.log_logit_scale.device) for part in batch)
        cls = network.encode_cls(token_ids, token_mask)
        wanted = self._vectors[drawn].to(cls.device).float()
        return (1 - F.cosine_similarity(cls[:, : wanted.shape[1]].float(), wanted)).sum()


def _narrowed(vectors: Tensor, width: int) -> Tensor:
    """Vectors (N, S) of at most this width, as float16: in the directions in which they differ most, if S is more."""
    if vectors.shape[1] <= width:
        return vectors
    rows = vectors.float()
    _, directions = torch.linalg.eigh(rows.T @ rows)  # by rising eigenvalue
    return F.normalize(rows @ directions[:, -width:], dim=-1).half()
