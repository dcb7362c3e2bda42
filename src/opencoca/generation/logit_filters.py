"""Logit filters: each forbids some next tokens, or makes them less probable.

Letters: R texts in work, T tokens of each, V vocabulary, n length of an n-gram.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from opencoca.generation.options import GenerationOptions
from opencoca.generation.words import ForbidWords, RequireWords
from opencoca.tokenizer import Tokenizer


class LogitFilter(Protocol):
    """Changes log_probs (R, V) of the next tokens, in place, given the tokens so far (R, T), prompt included.

    only_forbids: no value but -inf is written, so that the others are still the model's log-probabilities.
    """

    only_forbids: bool

    def apply(self, log_probs: Tensor, token_ids: Tensor) -> None: ...


class Suppress:
    """Forbids these tokens."""

    only_forbids = True

    def __init__(self, ids: Sequence[int]):
        self.ids = torch.tensor(ids)

    def apply(self, log_probs: Tensor, token_ids: Tensor) -> None:
        self.ids = self.ids.to(log_probs.device)
        log_probs.index_fill_(1, self.ids, -torch.inf)


class MinimumLength:
    """Forbids the end token while a text has fewer than this many tokens."""

    only_forbids = True

    def __init__(self, length: int, eos_id: int):
        self.length = length
        self.eos_id = eos_id

    def apply(self, log_probs: Tensor, token_ids: Tensor) -> None:
        if token_ids.shape[1] < self.length:
            log_probs[:, self.eos_id] = -torch.inf


class RepetitionPenalty:
    """Multiplies the log-probability of tokens that the text has already (CTRL, arXiv 1909.05858, section 4.1).

    It takes no raw logits, whose sign means nothing: a constant added to all of them changes no probability, but would
    change the product.
    """

    only_forbids = False

    def __init__(self, penalty: float):
        self.penalty = penalty

    def apply(self, log_probs: Tensor, token_ids: Tensor) -> None:
        log_probs.scatter_(1, token_ids, log_probs.gather(1, token_ids) * self.penalty)


class NoRepeatNgram:
    """Forbids that a run of n tokens occurs twice in a text (arXiv 1705.04304, section 2.5)."""

    only_forbids = True

    def __init__(self, n: int):
        self.n = n

    def apply(self, log_probs: Tensor, token_ids: Tensor) -> None:
        length = token_ids.shape[1]
        if length < self.n:
            return
        ngrams = token_ids.unfold(1, self.n, 1)
        begins_so = (ngrams[:, :, :-1] == token_ids[:, None, length - self.n + 1 :]).all(dim=2)
        rows, places = begins_so.nonzero(as_tuple=True)
        log_probs[rows, ngrams[rows, places, -1]] = -torch.inf


def make_filters(
    options: GenerationOptions, tokenizer: Tokenizer, prompt_length: int, max_length: int, vocab_size: int
) -> list[LogitFilter]:
    """The filters that the options ask for; vocab_size is the model's, which may have more ids than the tokenizer.

    Raises ValueError if the required words do not fit into max_length, or a word cannot be written.
    """
    without_text = [tokenizer.bos_id, tokenizer.pad_id, *range(tokenizer.vocab_size, vocab_size)]
    filters: list[LogitFilter] = []
    if options.repetition_penalty != 1:
        filters.append(RepetitionPenalty(options.repetition_penalty))
    filters.append(Suppress(without_text))
    if options.min_new_tokens:
        filters.append(MinimumLength(prompt_length + options.min_new_tokens, tokenizer.eos_id))
    if options.no_repeat_ngram:
        filters.append(NoRepeatNgram(options.no_repeat_ngram))
    if options.forbidden_words:
        filters.append(ForbidWords(options.forbidden_words, tokenizer))
    if options.required_words:
        filters.append(RequireWords(options.required_words, tokenizer, prompt_length, max_length))
    return filters
