"""Logit filters: each forbids some next tokens, or makes them less probable.

Letters: R texts in work, T tokens of each, V vocabulary, n length of an n-gram.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from opencoca.generation.options import GenerationOptions
from opencoca.generation.search import Limits
from opencoca.generation.words import ForbidWords, RequireWords
from opencoca.tokenizer import Tokenizer

LogitFilter = Callable[[Tensor, Tensor], None]
"""Changes log_probs (R, V) of the next tokens, in place, given the tokens so far (R, T), prompt included."""


def suppress(log_probs: Tensor, token_ids: Tensor, ids: Tensor) -> None:
    """Forbids the tokens with these ids."""
    log_probs.index_fill_(1, ids, -torch.inf)


def require_length(log_probs: Tensor, token_ids: Tensor, length: int, eos_id: int) -> None:
    """Forbids the end token while a text has fewer tokens than this length."""
    if token_ids.shape[1] < length:
        log_probs[:, eos_id] = -torch.inf


def penalise_repetition(log_probs: Tensor, token_ids: Tensor, penalty: float) -> None:
    """Multiplies the log-probability of tokens that the text has already (CTRL, arXiv 1909.05858, section 4.1).

    It takes no raw logits, whose sign means nothing: a constant added to all of them changes no probability, but would
    change the product.
    """
    log_probs.scatter_(1, token_ids, log_probs.gather(1, token_ids) * penalty)


def forbid_repeated_ngrams(log_probs: Tensor, token_ids: Tensor, n: int) -> None:
    """Forbids that a run of n tokens occurs twice in a text (arXiv 1705.04304, section 2.5)."""
    length = token_ids.shape[1]
    if length < n:
        return
    ngrams = token_ids.unfold(1, n, 1)
    begins_so = (ngrams[:, :, :-1] == token_ids[:, None, length - n + 1 :]).all(dim=2)
    rows, places = begins_so.nonzero(as_tuple=True)
    log_probs[rows, ngrams[rows, places, -1]] = -torch.inf


def make_filters(
    options: GenerationOptions, tokenizer: Tokenizer, limits: Limits, vocab_size: int, device: torch.device | str
) -> Sequence[LogitFilter]:
    """The filters that the options ask for; vocab_size is the model's, which may have more ids than the tokenizer.

    Raises ValueError if the required words do not fit into the text's length, or a word cannot be written.
    """
    without_text = [*tokenizer.ids_without_text, *range(tokenizer.vocab_size, vocab_size)]
    filters: list[LogitFilter] = []
    if options.repetition_penalty != 1:
        filters.append(partial(penalise_repetition, penalty=options.repetition_penalty))
    filters.append(partial(suppress, ids=torch.tensor(without_text, device=device)))
    if options.min_new_tokens:
        length = limits.prompt_length + options.min_new_tokens
        filters.append(partial(require_length, length=length, eos_id=limits.eos_id))
    if options.no_repeat_ngram:
        filters.append(partial(forbid_repeated_ngrams, n=options.no_repeat_ngram))
    if options.forbidden_words:
        filters.append(ForbidWords(options.forbidden_words, tokenizer))
    if options.required_words:
        filters.append(RequireWords(options.required_words, tokenizer, limits.prompt_length, limits.max_length))
    return filters
