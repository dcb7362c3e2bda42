"""Searches with one text at a time: greedy, and sampling. `BeamSearch` is in beam_search.py.

Letters: I images in work, R texts in work (those of an image side by side), V vocabulary, T tokens so far.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opencoca.generation.options import GenerationOptions
from opencoca.generation.sampling import draw, drawable_tokens, text_seeds, uniform_numbers


@dataclass(frozen=True)
class Limits:
    """What ends a text: its end token, or max_length tokens, of which prompt_length are the prompt's."""

    prompt_length: int
    max_length: int
    eos_id: int


@dataclass(frozen=True)
class Candidate:
    """A text that is finished, or was cut.

    row: the cache row that it is read from; visible: (N,) the entries there that hold its tokens, all but the last.
    """

    token_ids: list[int]
    log_probability: float
    score: float
    row: int
    visible: Tensor


class SingleTexts:
    """Texts that go on by themselves: each by its most probable token, or by one that is drawn.

    image_seeds (I,) int64 are needed for drawing only.

    A search, this one or `BeamSearch`, decides which texts of an image go on, by which token, and which are the result.
    texts_per_image: how many are in work, from the first extension on (before it: one, the prompt).
    shares_cache: whether they are read from one cache row, each seeing its own ancestors there; else each has its row.
    token_ids (R, T): the texts in work. done (I,): whether nothing can change an image's result any more.
    """

    shares_cache = False

    def __init__(self, options: GenerationOptions, limits: Limits, prompt: Tensor, image_seeds: Tensor):
        self.options, self.limits = options, limits
        self.texts_per_image = options.num_captions
        num_texts = prompt.shape[0] * self.texts_per_image
        self.token_ids = prompt
        self.totals = torch.zeros(num_texts, device=prompt.device)
        self.ended = torch.zeros(num_texts, dtype=torch.bool, device=prompt.device)
        self.done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        self.draws = options.samples
        self.uniforms = torch.empty(num_texts, 0, device=prompt.device)
        if self.draws:
            seeds = text_seeds(image_seeds.to(prompt.device), self.texts_per_image)
            self.uniforms = uniform_numbers(options.seed, seeds, limits.max_length - limits.prompt_length)

    def extend(self, allowed: Tensor, log_probs: Tensor, visible: Tensor | None) -> Tensor:
        """Makes the texts in work one token longer; returns which of the present texts each comes from: (R,).

        allowed (R, V): the log-probabilities after all filters; log_probs (R, V): the model's own; visible (R, N): the
        cache entries of each text, where they share rows.
        """
        num_texts = self.totals.shape[0]
        rows = torch.arange(allowed.shape[0], device=allowed.device)
        if allowed.shape[0] != num_texts:  # the prompt, of which all texts of an image are made
            rows = rows.repeat_interleave(self.texts_per_image)
        next_ids = self._draw(allowed, rows) if self.draws else allowed.argmax(dim=1)[rows]
        next_ids = next_ids.where(~self.ended, self.limits.eos_id)
        self.totals += log_probs[rows, next_ids].to(self.totals.dtype).where(~self.ended, 0)
        self.ended |= next_ids == self.limits.eos_id
        self.done = self.ended.view(-1, self.texts_per_image).all(dim=1)
        self.token_ids = torch.cat((self.token_ids[rows], next_ids[:, None]), dim=1)
        return rows

    def _draw(self, allowed: Tensor, rows: Tensor) -> Tensor:
        draws = drawable_tokens(allowed, self.options)
        position = self.token_ids.shape[1] - self.limits.prompt_length
        if draws.token_ids.shape[0] != rows.shape[0]:
            draws = type(draws)(draws.log_probs[rows], draws.token_ids[rows])
        return draw(draws, self.uniforms[:, position])

    def results(self, images: Tensor) -> list[list[Candidate]]:
        """Candidates of each of these images in work (I',), the best first."""
        per_image, start = self.texts_per_image, self.limits.prompt_length
        rows = (images[:, None] * per_image + torch.arange(per_image, device=images.device)).flatten()
        texts = [self._until_end(ids) for ids in self.token_ids[rows].tolist()]
        num_cached = torch.tensor([len(ids) - 1 for ids in texts], device=images.device)
        seen = torch.arange(self.limits.max_length, device=images.device) < num_cached[:, None]
        found: list[list[Candidate]] = [[] for _ in range(images.shape[0])]
        for place, (ids, total, row) in enumerate(zip(texts, self.totals[rows].tolist(), rows.tolist(), strict=True)):
            score = total / (len(ids) - start) ** self.options.length_penalty
            found[place // per_image].append(Candidate(ids, total, score, row, seen[place]))
        return [sorted(of_image, key=lambda candidate: -candidate.score) for of_image in found]

    def _until_end(self, ids: list[int]) -> list[int]:
        start = self.limits.prompt_length
        return ids[: ids.index(self.limits.eos_id, start) + 1] if self.limits.eos_id in ids[start:] else ids

    def keep(self, images: Tensor) -> None:
        """Keeps these images (I',) in work, in this order."""
        self.done = self.done[images]
        self.token_ids, self.totals, self.ended, self.uniforms = (
            x.unflatten(0, (-1, self.texts_per_image))[images].flatten(0, 1)
            for x in (self.token_ids, self.totals, self.ended, self.uniforms)
        )
