"""Sentences: the text tower learns from a sentence encoder which texts mean nearly the same.

A few thousand images come with a few ten thousand captions, which is little to learn from what words mean. A sentence
encoder has read a billion pairs of sentences. What it makes of many texts, captions of the training images or any
others, is computed once (scripts/embed_sentences.py) and stored in a file; in training the text tower's [CLS] vector
learns the direction of the sentence encoder's vector. The text projection after it is free to turn and stretch that
space for images (knowledge distillation, arXiv 1503.02531). A text in another language may have the vector of its
translation into the sentence encoder's own (arXiv 2004.09813).

Letters: N texts, D width of the text tower, S width of the sentence encoder's vectors.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opencoca.data.captions import collate_captions
from opencoca.model.coca import CoCa
from opencoca.store.safetensors_file import read_tensors, write_tensors
from opencoca.tokenizer import Tokenizer
from opencoca.tokenizer.languages import LanguageText, language_of

_VECTORS, _TEXTS, _LANGUAGES = "vectors", "texts", "languages"
_REMEDY = "make it with scripts/embed_sentences.py"


def write_sentences(path: Path, texts: Sequence[str], vectors: Tensor) -> None:
    """Stores texts, with the languages that they know (`LanguageText`), and the directions of their vectors (N, S).

    Texts lose their line breaks.
    """
    tensors = {_VECTORS: F.normalize(vectors.float(), dim=-1).half().contiguous(), _TEXTS: _lines(texts)}
    if any(map(language_of, texts)):
        tensors[_LANGUAGES] = _lines([language_of(text) or "" for text in texts])
    write_tensors(path, tensors)


def read_sentences(path: Path) -> tuple[list[str], Tensor]:
    """Returns the texts of a file that `write_sentences` wrote, and their vectors (N, S).

    Raises ValueError if it is none, FileNotFoundError if it is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; {_REMEDY}")
    tensors = read_tensors(path)
    vectors = tensors.get(_VECTORS)
    if vectors is None or vectors.ndim != 2 or not vectors.is_floating_point() or _TEXTS not in tensors:
        raise ValueError(f"{path} is no file of sentences and their vectors; {_REMEDY}")
    texts = _read_lines(path, tensors[_TEXTS])
    languages = _read_lines(path, tensors[_LANGUAGES]) if _LANGUAGES in tensors else [""] * len(texts)
    if not len(texts) == len(languages) == len(vectors):
        raise ValueError(f"{path} has {len(texts)} texts and {len(vectors)} vectors; {_REMEDY}")
    if not bool(vectors.isfinite().all()):
        raise ValueError(f"{path} has vectors with infinities or NaN; {_REMEDY}")
    known = zip(texts, languages, strict=True)
    return [LanguageText(text, language) if language else text for text, language in known], vectors


def _lines(texts: Sequence[str]) -> Tensor:
    written = "\n".join(" ".join(text.split()) for text in texts).encode()
    return torch.frombuffer(bytearray(written), dtype=torch.uint8) if written else torch.empty(0, dtype=torch.uint8)


def _read_lines(path: Path, written: Tensor) -> list[str]:
    try:
        return written.numpy().tobytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: its texts are not UTF-8 ({error.reason}); {_REMEDY}") from error


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
        token_ids, token_mask = (part.to(network.device) for part in batch)
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
