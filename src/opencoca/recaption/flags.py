"""Flags suspicious captions by their words alone: too short, repetitive, or the same for many images."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

NEAR_EMPTY, REPETITION, COMMON = "near-empty", "repetition", "common"
ALL_FLAGS = (NEAR_EMPTY, REPETITION, COMMON)

# Scripts without spaces: one character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:'[^\W{_UNSPACED}]+)?")
_ARTICLES = frozenset({"a", "an", "the"})


@dataclass(frozen=True)
class FlagThresholds:
    """The limits from which on a caption is flagged.

    min_words: a caption of fewer words is near-empty; the prefix that all captions begin with does not count.
    max_repeats: a caption is a repetition if a word, or a run of up to `longest_run` words, occurs more often than this
        in immediate succession.
    longest_run: length of such a run, in words.
    min_distinct: a caption of 10 words or more is a repetition too if the distinct ones among its pairs of neighbouring
        words are less than this share.
    common_share: a caption is common if at least this share of all images has the same one: the same words in any
        order, without regard to case, punctuation and articles.
    common_images: the least number of images that a common caption has.
    """

    min_words: int = 2
    max_repeats: int = 2
    longest_run: int = 8
    min_distinct: float = 0.5
    common_share: float = 0.05
    common_images: int = 10


_PAIRS_FROM_WORDS = 10


def split_words(text: str) -> list[str]:
    """Splits a text into words, in lower case and without punctuation."""
    return _WORD.findall(text.lower())


def caption_flags(text: str, prefix: str = "", thresholds: FlagThresholds | None = None) -> tuple[str, ...]:
    """Returns the flags that follow from a caption alone: near-empty, repetition."""
    limits = thresholds or FlagThresholds()
    words = split_words(text)
    flags: list[str] = []
    if len(words) - len(split_words(prefix)) < limits.min_words:
        flags.append(NEAR_EMPTY)
    if _repeats(words, limits.longest_run) > limits.max_repeats or _is_monotonous(words, limits.min_distinct):
        flags.append(REPETITION)
    return tuple(flags)


def _repeats(words: list[str], longest_run: int) -> int:
    """Returns the largest number of times that a run of words occurs in immediate succession."""
    most = min(len(words), 1)
    for length in range(1, min(longest_run, len(words) // 2) + 1):
        equal = 0  # the number of consecutive words that equal the word `length` places before
        for word, earlier in zip(words[length:], words, strict=False):
            equal = equal + 1 if word == earlier else 0
            most = max(most, 1 + equal // length)
    return most


def _is_monotonous(words: list[str], min_distinct: float) -> bool:
    if len(words) < _PAIRS_FROM_WORDS:
        return False
    pairs = list(itertools.pairwise(words))
    return len(set(pairs)) < min_distinct * len(pairs)


@dataclass
class CommonCaptions:
    """Counts how many images share a caption, to find the captions of very many images."""

    thresholds: FlagThresholds = field(default_factory=FlagThresholds)
    num_images: int = 0
    _counts: Counter[int] = field(default_factory=Counter)

    def add(self, texts: Iterable[str]) -> None:
        """Counts the captions of one image; equal ones count once."""
        self.num_images += 1
        self._counts.update({_sameness(text) for text in texts})

    def is_common(self, text: str) -> bool:
        """Tells whether this caption belongs to so many images that it says little about any of them."""
        least = max(self.thresholds.common_images, self.thresholds.common_share * self.num_images)
        return self._counts[_sameness(text)] >= least


def _sameness(text: str) -> int:
    """Returns a hash that is equal for captions that count as the same; millions of texts would fill the memory."""
    return hash(frozenset(split_words(text)) - _ARTICLES)
