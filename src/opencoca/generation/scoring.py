"""How probable given texts are for given images: log p(text | image), by the captioner.

The unimodal half never sees an image, so every text passes it once, whatever the number of images; an image's keys and
values are projected once, whatever the number of texts; logits of words times vocabulary exist in chunks only.

Classifying by likelihood compares log p(text | image) with log p(text): the difference, the pointwise mutual
information, does not reward a text for being common or short (arXiv 2306.01879). The text's own probability is
estimated as its mean probability over images that say nothing about it.

Letters: I images, Q image tokens, D width, B texts, K texts of an image, T text positions, S words to predict,
V vocabulary, L labels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opencoca.model.coca import CoCa
from opencoca.model.layers.layout import TextLayout
from opencoca.model.text_decoder import Words

_WORDS_AT_A_TIME = 8192
_LOGITS_AT_A_TIME = 1 << 24  # numbers, 64 MiB in float32
_TEXTS_AT_A_TIME = 512


class TextScorer:
    """Texts, ready to be scored for any number of images.

    token_ids (B, T), token_mask (B, T) True = real: texts with start and end token, padded at their end, as
    `Tokenizer.__call__` gives them. given_ids: tokens that are given, wherever they stand, and not
    predicted, such as those of languages. words_at_a_time bounds the memory of a call.

    Attributes: `num_texts` (B); `lengths` (B,): how many tokens follow the start token of each text, its end token
    included, so that a score divided by its length is the mean log-probability of a token where none is given.

    Raises ValueError if a text has fewer than two tokens or padding before its end, or the model is in training mode.
    """

    def __init__(
        self,
        model: CoCa,
        token_ids: Tensor,
        token_mask: Tensor,
        *,
        given_ids: Sequence[int] = (),
        words_at_a_time: int = _WORDS_AT_A_TIME,
    ) -> None:
        if model.training:
            raise ValueError("the model is in training mode, where dropout spoils scores; call model.eval() first")
        if words_at_a_time < 1:
            raise ValueError(f"words_at_a_time is {words_at_a_time}; it must be 1 or more")
        mask = token_mask.bool()
        if token_ids.shape[0] and (token_ids.shape[1] < 2 or not bool(mask[:, :2].all())):
            raise ValueError("a text to score needs at least two tokens, start and end; one here has fewer")
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError(
                "a text to score has padding before its end; pad texts at their end, as the tokenizer does"
            )
        self.model = model
        self.num_texts = token_ids.shape[0]
        self.lengths = mask[:, 1:].sum(dim=1)
        self._words_at_a_time = words_at_a_time
        self._starts = self.lengths.cumsum(dim=0) - self.lengths
        self._next_ids = token_ids[:, 1:][mask[:, 1:]]
        self._is_given = torch.isin(self._next_ids, torch.tensor(given_ids, device=token_ids.device))
        self._states = self._unimodal_states(token_ids[:, :-1], mask[:, 1:])

    @torch.inference_mode()
    def _unimodal_states(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """(S, D): the states of all words that have a next one, text by text."""
        states = []
        for start in range(0, self.num_texts, _TEXTS_AT_A_TIME):
            part = slice(start, start + _TEXTS_AT_A_TIME)
            states.append(self.model.word_states(token_ids[part], token_mask[part]).states)
        return torch.cat(states) if states else self.model.vocab_weight[:0]

    def score_all(self, image_tokens: Tensor) -> Tensor:
        """image_tokens (I, Q, D), as `CoCa.encode_image` gives them -> (I, B): log p(text | image), in nats."""
        every = torch.arange(self.num_texts, device=image_tokens.device)
        return self.score_chosen(image_tokens, every.expand(image_tokens.shape[0], -1))

    @torch.inference_mode()
    def score_chosen(self, image_tokens: Tensor, chosen: Tensor) -> Tensor:
        """image_tokens (I, Q, D), chosen (I, K) texts for each image -> (I, K): log p(text | image), in nats."""
        num_images, num_chosen = chosen.shape
        dtype = torch.promote_types(image_tokens.dtype, torch.float32)
        scores = torch.zeros(num_images, num_chosen, device=image_tokens.device, dtype=dtype)
        if scores.numel() == 0:
            return scores
        chosen = chosen.to(self._starts.device)
        longest = int(self.lengths.max())
        texts_at_a_time = min(num_chosen, max(1, self._words_at_a_time // longest))
        images_at_a_time = max(1, self._words_at_a_time // (longest * texts_at_a_time))
        for image in range(0, num_images, images_at_a_time):
            images = slice(image, image + images_at_a_time)
            keys_values = self.model.project_image(image_tokens[images])
            for text in range(0, num_chosen, texts_at_a_time):
                part = chosen[images, text : text + texts_at_a_time]
                scores[images, text : text + texts_at_a_time] = self._score(keys_values, part.flatten()).view_as(part)
        return scores

    def _score(self, keys_values: list[tuple[Tensor, Tensor]], texts: Tensor) -> Tensor:
        """The score (R,) of each of these texts (R,), as many for every image."""
        lengths = self.lengths[texts]
        row_of_word = torch.repeat_interleave(torch.arange(texts.shape[0], device=texts.device), lengths)
        layout = TextLayout.of(lengths)
        words = self._starts[texts][row_of_word] + layout.positions
        hidden = self.model.hidden_states(Words(self._states[words], layout), keys_values)
        gained = word_log_probs(self.model, hidden, self._next_ids[words]).masked_fill(self._is_given[words], 0.0)
        return gained.new_zeros(texts.shape[0]).index_add_(0, row_of_word, gained)


@torch.inference_mode()
def word_log_probs(model: CoCa, hidden: Tensor, next_ids: Tensor) -> Tensor:
    """hidden (S, D), next_ids (S,) -> (S,) at least float32: each next word's log-probability; (S, V) is never held."""
    rows = max(1, _LOGITS_AT_A_TIME // model.config.text.vocab_size)
    found = []
    for start in range(0, hidden.shape[0], rows):
        logits = model.word_logits(hidden[start : start + rows])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        right = logits.gather(1, next_ids[start : start + rows, None]).squeeze(1)
        found.append(right - logits.logsumexp(dim=-1))
    return torch.cat(found)


def prior_of_texts(scorer: TextScorer, image_tokens: Tensor) -> Tensor:
    """image_tokens (I, Q, D) -> (B,): the logarithm of each text's mean probability over these images.

    Of many images it estimates log p(text); of one blank image, what the captioner would say without seeing anything.
    """
    return scorer.score_all(image_tokens).logsumexp(dim=0) - math.log(image_tokens.shape[0])


def pointwise_mutual_information(scores: Tensor, prior: Tensor, prior_weight: float = 1.0) -> Tensor:
    """log p(text | image) - prior_weight x log p(text): scores (I, B), prior (B,) -> (I, B), in nats."""
    return scores - prior_weight * prior


def label_scores(text_scores: Tensor, num_labels: int) -> Tensor:
    """(I, L x templates), a label's texts side by side -> (I, L): each label's mean over its templates."""
    return text_scores.unflatten(1, (num_labels, -1)).mean(dim=2)
