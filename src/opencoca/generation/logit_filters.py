"""Logit filters: each forbids some next tokens.

Letters: R texts in work, T tokens of each, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor

from opencoca.generation.options import GenerationOptions
from opencoca.tokenizer import Tokenizer


class LogitFilter(Protocol):
    """Changes logits (R, V), in place, given the tokens so far (R, T), prompt included."""

    def apply(self, logits: Tensor, token_ids: Tensor) -> None: ...


class Suppress:
    """Never these tokens."""

    def __init__(self, ids: list[int]):
        self.ids = ids

    def apply(self, logits: Tensor, token_ids: Tensor) -> None:
        logits[:, self.ids] = -torch.inf


class MinimumLength:
    """Not the end token while a text has fewer than this many tokens."""

    def __init__(self, length: int, eos_id: int):
        self.length = length
        self.eos_id = eos_id

    def apply(self, logits: Tensor, token_ids: Tensor) -> None:
        if token_ids.shape[1] < self.length:
            logits[:, self.eos_id] = -torch.inf


def make_filters(
    options: GenerationOptions, tokenizer: Tokenizer, prompt_length: int, vocab_size: int
) -> list[LogitFilter]:
    """The filters that the options ask for; vocab_size is the model's, which may have more ids than the tokenizer."""
    without_text = [tokenizer.bos_id, tokenizer.pad_id, *range(tokenizer.vocab_size, vocab_size)]
    filters: list[LogitFilter] = [Suppress(without_text)]
    if options.min_new_tokens:
        filters.append(MinimumLength(prompt_length + options.min_new_tokens, tokenizer.eos_id))
    return filters
