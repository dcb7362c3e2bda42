"""Sentences with the vectors that a sentence encoder gives them, and how the linear branch begins with what these tell.

A few thousand images come with a few ten thousand captions, which is little to learn from what words mean. A sentence
encoder has read a billion pairs of sentences. What it makes of many texts, captions of the training images or any
others, is computed once (scripts/embed_sentences.py) and stored in a file. Words get the vectors whose means over those
texts come nearest to the sentence encoder's. A text in another language may have the vector of its translation into the
sentence encoder's own (arXiv 2004.09813).

The class part of the branch begins, and stays, with what an image encoder that was trained on labels knows: its classes
lie in the directions in which its classifier's weights differ most, which are the image's part, and words get the
vectors whose means over the classes' names lie there. A label is a text, too (the CoCa paper, section 3.1). The
sentences, which speak of anything, should lie nowhere, so that what names no class counts little.

Letters: N texts, S width of the sentence encoder's vectors, K numbers of the linear branch that are fitted to
classes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from opencoca.evaluation.prompts import load_imagenet_class_names
from opencoca.model.coca import CoCa
from opencoca.model.encoders.efficientnet_lite import EfficientNetLite
from opencoca.model.layers.linear_branch import LinearBranch, fit_words
from opencoca.store.interop.efficientnet_weights import load_imagenet_classifier
from opencoca.store.safetensors_file import read_tensors, write_tensors
from opencoca.tokenizer import Tokenizer
from opencoca.tokenizer.languages import LanguageText, language_of

_VECTORS, _TEXTS, _LANGUAGES = "vectors", "texts", "languages"
_REMEDY = "make it with scripts/embed_sentences.py"
_TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}",
    "a picture of a {}",
    "a close up of a {}",
    "there is a {}",
    "a {}",
    "the {}",
    "{}",
)
# What the squares of words' vectors count beside the squares of errors; how much the error of a sentence counts where
# that of a name counts 1; how long a name's vector is to be.
_RIDGE, _NAMES_RIDGE, _NO_CLASS, _NAME_LENGTH = 0.03, 0.01, 0.3, 2.4


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


@torch.no_grad()
def start_linear_branch(network: CoCa, tokenizer: Tokenizer, path: Path) -> str:
    """Sets the linear branch to what the sentences of a file and the image encoder's classifier tell; says what it did.

    Raises ValueError for a network without a linear branch, as `read_sentences`, and for a class part where the image
    encoder has no classifier.
    """
    branch = network.linear_branch
    if branch is None:
        raise ValueError("task.sentences needs a network with a linear branch: set model.linear.dim")
    texts, vectors = read_sentences(path)
    length, dim = network.config.text.context_length, branch.config.dim
    ids = [torch.as_tensor(row) for row in tokenizer.encode_batch(texts, length)]
    wanted, ones = _narrowed(vectors.float(), dim), torch.ones(len(ids))
    size = branch.word_embed.num_embeddings
    words = fit_words(ids, wanted, size, _RIDGE, ones)
    # Words of no sentence keep the small values that they were drawn with: a vector of length 0 has no direction.
    used = torch.cat(ids).unique()
    branch.word_embed.weight[used, :dim] = F.pad(words[used], (0, dim - words.shape[1]))
    said = f"words from {len(texts):,} sentences: mean cosine {_cosine(words, ids, wanted):.3f}"
    if branch.class_proj is None:
        return said
    names, directions = _names(network, branch, tokenizer)
    own = set(map(tuple, (row.tolist() for row in names)))
    others = [row for row in ids if tuple(row.tolist()) not in own]
    weights = torch.cat((torch.ones(len(names)), torch.full((len(others),), _NO_CLASS)))
    nowhere = torch.zeros(len(others), directions.shape[1])
    words = fit_words([*names, *others], torch.cat((_NAME_LENGTH * directions, nowhere)), size, _NAMES_RIDGE, weights)
    branch.word_embed.weight[:, dim:] = words
    return f"{said}; of {len(names):,} texts with classes' names: {_cosine(words, names, directions):.3f}"


def _names(network: CoCa, branch: LinearBranch, tokenizer: Tokenizer) -> tuple[list[Tensor], Tensor]:
    """The ids of texts with the classes' names, and where their classes lie (N, K), of length 1; sets the image's part.

    Where K is less than the number of classes, it keeps most of what tells them apart: of EfficientNet-Lite2's 1,280
    channels the 256 best directions alone name 78% of photographs as the whole classifier does, by cosine.
    """
    encoder = network.structure().image_encoder
    if not isinstance(encoder, EfficientNetLite):
        raise ValueError(
            "model.linear.class_dim needs an image encoder with a classifier (efficientnet_lite0 to 2); set it to 0"
        )
    assert branch.class_proj is not None
    classifier, _ = load_imagenet_classifier(encoder)
    centred = classifier.float() - classifier.float().mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = directions[: branch.config.class_dim]
    branch.class_proj.weight.zero_()
    branch.class_proj.weight[: len(kept)] = kept
    if "en" in tokenizer.languages:  # as the names are
        tokenizer = tokenizer.in_language("en")
    classes = F.normalize(centred @ branch.class_proj.weight.T.cpu(), dim=1)
    texts = [template.format(name) for template in _TEMPLATES for name in load_imagenet_class_names()]
    ids = [torch.as_tensor(row) for row in tokenizer.encode_batch(texts, network.config.text.context_length)]
    return ids, classes.repeat(len(_TEMPLATES), 1)


def _cosine(words: Tensor, texts: Sequence[Tensor], wanted: Tensor) -> float:
    """The mean cosine of texts' vectors and what is wanted of them."""
    means = torch.stack([words[ids].mean(dim=0) for ids in texts])
    return float(F.cosine_similarity(means, wanted).mean())


def _narrowed(vectors: Tensor, width: int) -> Tensor:
    """Vectors (N, S) of at most this width: in the directions in which they differ most, if S is more."""
    if vectors.shape[1] <= width:
        return vectors
    _, directions = torch.linalg.eigh(vectors.T @ vectors)  # by rising eigenvalue
    return F.normalize(vectors @ directions[:, -width:], dim=-1)
