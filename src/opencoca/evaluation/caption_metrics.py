"""How good generated captions are: BLEU-1..4, ROUGE-L and CIDEr-D against several human captions an image.

The figures equal those of pycocoevalcap, the implementation behind published results, and need neither it nor Java.
Tokens come from ``ptb_tokenizer``, and from ``caption_words`` for languages that it is not made for.

Sources: BLEU (Papineni et al., 2002), ROUGE-L (Lin, 2004), CIDEr-D (Vedantam et al., 2015, section 5).
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from opencoca.evaluation.caption_words import caption_tokens

MAX_NGRAM = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0

# pycocoevalcap's guards against division by zero; they reach the score of a set without a matching 4-gram.
_BLEU_TINY, _BLEU_SMALL = 1e-15, 1e-9

Key = TypeVar("Key", bound=Hashable)
Ngram = tuple[str, ...]


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one set of captions on the usual scale: 0 to 1 (CIDEr-D: 0 to 10); tables print them times 100.

    ``cider_d_of_image`` holds the CIDEr-D of every image by its key; their mean is ``cider_d``.
    """

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider_d: float
    num_images: int
    cider_d_of_image: Mapping[Hashable, float] = field(repr=False)


def caption_scores(
    candidates: Mapping[Key, str], references: Mapping[Key, Sequence[str]], language: str | None = None
) -> CaptionScores:
    """Score one generated caption an image against that image's reference captions.

    Args:
        candidates: the generated caption of each image, by any key (file name, id).
        references: the human captions of the same images, by the same keys; their number may differ between images.
        language: which all of them are in; it decides what a word is (see `token_kind`).

    CIDEr-D weighs n-grams by how rare they are among the references given, so it depends on the whole set and is 0
    for a single image. BLEU counts over the set; ROUGE-L and CIDEr-D are means over images.

    Raises:
        ValueError: no images, an image on one side only, an image without references, or a caption that is not text.
    """
    check_captions(candidates, references)
    keys = list(candidates)
    candidate_tokens = [caption_tokens(candidates[key], language) for key in keys]
    reference_tokens = [[caption_tokens(caption, language) for caption in references[key]] for key in keys]
    candidate_counts = [ngram_counts(tokens) for tokens in candidate_tokens]
    reference_counts = [[ngram_counts(tokens) for tokens in captions] for captions in reference_tokens]
    bleu = _bleu(candidate_counts, reference_counts)
    rouge = [_rouge_l(*tokens) for tokens in zip(candidate_tokens, reference_tokens, strict=True)]
    scorer = CiderD(reference_counts)
    cider = [scorer.scores([c], r)[0] for c, r in zip(candidate_counts, reference_counts, strict=True)]
    return CaptionScores(
        *bleu,
        rouge_l=math.fsum(rouge) / len(keys),
        cider_d=math.fsum(cider) / len(keys),
        num_images=len(keys),
        cider_d_of_image=dict(zip(keys, cider, strict=True)),
    )


def check_captions(candidates: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> None:
    """Raise ``ValueError`` unless both sides hold the same images, each with a caption and with references."""
    if not candidates:
        raise ValueError("There are no captions to score: give at least one image.")
    for missing, side, remedy in (
        (candidates.keys() - references.keys(), "references", "add their human captions or leave them out"),
        (references.keys() - candidates.keys(), "candidates", "caption them or leave them out"),
    ):
        if missing:
            raise ValueError(f"{len(missing)} images are missing from the {side} ({_some(missing)}): {remedy}.")
    for key, caption in candidates.items():
        if not isinstance(caption, str):
            raise ValueError(f"The caption of image {key!r} is {caption!r}: give one string an image.")
    for key, captions in references.items():
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"The references of image {key!r} are {captions!r}: give a list of strings.")
    empty = [key for key, captions in references.items() if len(captions) == 0]
    if empty:
        raise ValueError(f"{len(empty)} images have no reference caption ({_some(empty)}): leave them out.")


def _some(keys) -> str:
    names = sorted(map(repr, keys))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@dataclass(frozen=True)
class NgramCounts:
    """A caption's n-grams of 1 to 4 words, and how many words it has."""

    num_words: int
    of_order: tuple[Counter[Ngram], ...]  # unigrams first


def ngram_counts(tokens: Sequence[str]) -> NgramCounts:
    """Counts the n-grams of a caption's tokens, as `caption_tokens` gives them."""
    words = " ".join(tokens).split()  # a mixed fraction is one token to ROUGE-L, two words to n-grams
    orders = (zip(*(words[start:] for start in range(n)), strict=False) for n in range(1, MAX_NGRAM + 1))
    return NgramCounts(len(words), tuple(Counter(order) for order in orders))


def _bleu(candidates: Sequence[NgramCounts], references: Sequence[Sequence[NgramCounts]]) -> list[float]:
    """BLEU-1..4 from counts over the whole set, the closest reference length (on a tie the shorter)."""
    matched, possible = [0] * MAX_NGRAM, [0] * MAX_NGRAM
    candidate_length = reference_length = 0
    for candidate, captions in zip(candidates, references, strict=True):
        length = candidate.num_words
        candidate_length += length
        reference_length += min((abs(caption.num_words - length), caption.num_words) for caption in captions)[1]
        for order, counts in enumerate(candidate.of_order):
            possible[order] += max(0, length - order)
            matched[order] += sum(
                min(count, max(caption.of_order[order][ngram] for caption in captions))
                for ngram, count in counts.items()
            )
    ratio = (candidate_length + _BLEU_TINY) / (reference_length + _BLEU_SMALL)
    brevity_penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order in range(MAX_NGRAM):
        product *= (matched[order] + _BLEU_TINY) / (possible[order] + _BLEU_SMALL)
        scores.append(brevity_penalty * product ** (1 / (order + 1)))
    return scores


def _rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F-measure of the longest common subsequence: best precision and best recall over the references."""
    candidate = candidate or [""]  # as pycocoevalcap: an empty caption is one empty word
    common = [(_longest_common_subsequence(candidate, tokens or [""]), len(tokens or [""])) for tokens in references]
    precision = max(length for length, _ in common) / len(candidate)
    recall = max(length / num_tokens for length, num_tokens in common)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the usual table held in the bits of an integer.

    A zero bit marks a position of ``first`` where the length grows (Hyyrö, 2004).
    """
    positions: dict[str, int] = {}
    for index, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << index
    everything = (1 << len(first)) - 1
    row = everything
    for token in second:
        hits = row & positions.get(token, 0)
        row = (row + hits | row - hits) & everything
    return len(first) - row.bit_count()


class CiderD:
    """CIDEr-D with the document frequencies of one set of images, for captions of its images one at a time."""

    def __init__(self, references: Iterable[Sequence[NgramCounts]]):
        """references: the n-grams of each image's captions; an n-gram's frequency is how many images' hold it."""
        frequency: Counter[Ngram] = Counter()
        num_images = 0
        for captions in references:
            frequency.update({ngram for caption in captions for counts in caption.of_order for ngram in counts})
            num_images += 1
        # N-grams that no reference holds are as rare as those that one image's references hold.
        self._rarest = math.log(num_images) if num_images else 0.0
        self._idf = {ngram: self._rarest - math.log(count) for ngram, count in frequency.items()}

    def scores(self, candidates: Sequence[NgramCounts], references: Sequence[NgramCounts]) -> list[float]:
        """The CIDEr-D, from 0 to 10, of each of the candidates for one image that has these reference captions."""
        weighted = [self._weighted(caption) for caption in references]
        return [self._score(candidate, references, weighted) for candidate in candidates]

    def _score(
        self, candidate: NgramCounts, references: Sequence[NgramCounts], weighted: Sequence[Sequence["_Vector"]]
    ) -> float:
        vectors, score = self._weighted(candidate), 0.0
        for caption, reference in zip(references, weighted, strict=True):
            # The original measures length in bigrams, which matters for captions of no words or one.
            difference = max(candidate.num_words - 1, 0) - max(caption.num_words - 1, 0)
            penalty = math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
            score += penalty * sum(map(_clipped_cosine, vectors, reference))
        return 10 * score / (MAX_NGRAM * len(references))

    def _weighted(self, counts: NgramCounts) -> list["_Vector"]:
        """Tf-idf weights of each order, and their norm."""
        vectors = []
        for order in counts.of_order:
            vector = {ngram: count * self._idf.get(ngram, self._rarest) for ngram, count in order.items()}
            vectors.append(_Vector(vector, math.sqrt(math.fsum(weight * weight for weight in vector.values()))))
        return vectors


class _Vector(NamedTuple):
    weights: dict[Ngram, float]
    norm: float


def _clipped_cosine(candidate: _Vector, reference: _Vector) -> float:
    """Cosine of two tf-idf vectors; repeating a word more often than the reference earns nothing."""
    (weights, norm), (reference_weights, reference_norm) = candidate, reference
    if norm == 0 or reference_norm == 0:
        return 0.0
    shared = weights.keys() & reference_weights.keys()
    product = sum(min(weights[ngram], reference_weights[ngram]) * reference_weights[ngram] for ngram in shared)
    return product / (norm * reference_norm)
