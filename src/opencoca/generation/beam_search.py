"""Beam search, in groups that may be kept different from each other.

The rules are those of transformers' generate(): 2 x beams candidates a step, of which the ended ones among the best
`beams` are finished and the best others go on; finished ones are ranked by score / length ** length_penalty.

Letters: I images in work, G groups, g beams of a group, R = I x G x g texts in work, V vocabulary, K candidates,
T tokens so far, L max_length, N cache entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from opencoca.generation.options import GenerationOptions
from opencoca.generation.search import Candidate, Limits
from opencoca.generation.top_candidates import top_candidates


class _Finished(NamedTuple):
    """Texts of each group, the best first: scores (I, G, g), -inf where there is none, and what belongs to them."""

    scores: Tensor
    log_probs: Tensor
    lengths: Tensor
    token_ids: Tensor  # (I, G, g, L)
    visible: Tensor  # (I, G, g, N)


class _Candidates(NamedTuple):
    """Ways in which texts of a group may go on, the best first, each (I, K).

    scores: sums of what the search ranks by; log_probs: of the model's log-probabilities; parents: text rows.
    """

    scores: Tensor
    log_probs: Tensor
    parents: Tensor
    token_ids: Tensor

    def take(self, places: Tensor) -> "_Candidates":
        return _Candidates(*(x.gather(1, places) for x in self))


class BeamSearch:
    """`num_beams` texts of each image, in groups; see `SingleTexts` for attributes and methods.

    Groups that no penalty keeps apart would find the same texts: one of them is searched, for all.
    """

    shares_cache = True

    def __init__(self, options: GenerationOptions, limits: Limits, prompt: Tensor, num_entries: int):
        self.options, self.limits = options, limits
        self.texts_per_image, self.num_groups = options.texts_in_work, options.groups_in_work
        self.group_size = self.texts_per_image // self.num_groups
        self.token_ids = prompt
        num_images, device = prompt.shape[0], prompt.device
        self.scores = torch.zeros(num_images, device=device)
        self.log_probs = torch.zeros(num_images, device=device)
        shape = (num_images, self.num_groups, self.group_size)
        self.group_done = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        self.finished = _Finished(
            scores=torch.full(shape, -torch.inf, device=device),
            log_probs=torch.zeros(shape, device=device),
            lengths=torch.zeros(shape, dtype=torch.int64, device=device),
            token_ids=torch.full((*shape, limits.max_length), limits.eos_id, device=device),
            visible=torch.zeros((*shape, num_entries), dtype=torch.bool, device=device),
        )

    def extend(self, allowed: Tensor, log_probs: Tensor, visible: Tensor | None) -> Tensor:
        assert visible is not None, "beams share their rows"
        num_images = self.group_done.shape[0]
        candidates = self._candidates(allowed, log_probs)
        chosen: list[_Candidates] = []
        # A group that was done before has no say in what the others write.
        silent = self.group_done.clone()
        for group in range(self.num_groups):
            best = self._best_of_group(candidates, group, chosen, silent)
            ends = best.token_ids == self.limits.eos_id
            self._finish(best, ends, group, visible)
            # Those that have not ended come first, in their order.
            going_on = ends.to(torch.int8).argsort(dim=1, stable=True)[:, : self.group_size]
            chosen.append(best.take(going_on))
        parents = torch.stack([group.parents for group in chosen], dim=1).flatten()
        next_ids = torch.stack([group.token_ids for group in chosen], dim=1).view(-1, 1)
        self.scores = torch.stack([group.scores for group in chosen], dim=1).flatten()
        self.log_probs = torch.stack([group.log_probs for group in chosen], dim=1).flatten()
        self.token_ids = torch.cat((self.token_ids[parents], next_ids), dim=1)
        assert parents.shape[0] == num_images * self.texts_per_image
        if self.token_ids.shape[1] == self.limits.max_length:
            self._finish_the_rest(visible[parents])
        return parents

    def _candidates(self, allowed: Tensor, log_probs: Tensor) -> _Candidates:
        """The best ways to go on of every text in work: (R, K) each."""
        # The groups before may make as many of them worse as they have beams.
        wanted = 2 * self.group_size + (self.num_groups - 1) * self.group_size
        gained, token_ids = top_candidates(allowed, min(wanted, allowed.shape[1]))
        model_gained = gained if log_probs is allowed else log_probs.gather(1, token_ids)
        rows = torch.arange(allowed.shape[0], device=allowed.device)[:, None].expand_as(token_ids)
        return _Candidates(self.scores[:, None] + gained, self.log_probs[:, None] + model_gained, rows, token_ids)

    def _best_of_group(
        self, candidates: _Candidates, group: int, chosen: list[_Candidates], silent: Tensor
    ) -> _Candidates:
        """The 2 g best candidates of a group, after the penalty for what the groups before it have chosen.

        silent (I, G): groups whose choice does not count.
        """
        num_images = self.group_done.shape[0]
        starts = candidates.scores.shape[0] == num_images  # one text an image, the prompt
        beams = slice(0, 1) if starts else slice(group * self.group_size, (group + 1) * self.group_size)
        own = _Candidates(*(x.unflatten(0, (num_images, -1))[:, beams].flatten(1) for x in candidates))
        if group:
            used = torch.stack([other.token_ids for other in chosen], dim=1)
            used = used.masked_fill(silent[:, :group, None], -1).flatten(1)
            times_used = (own.token_ids[:, :, None] == used[:, None, :]).sum(dim=2)
            own = own._replace(scores=own.scores - self.options.diversity_penalty * times_used)
        places = own.scores.topk(min(2 * self.group_size, own.scores.shape[1]), dim=1).indices
        return own.take(places)

    def _finish(self, best: _Candidates, ends: Tensor, group: int, visible: Tensor) -> None:
        """Puts candidates that end into the group's finished texts, and says whether the group is done."""
        ends = ends[:, : self.group_size] & ~self.group_done[:, group, None]
        length = self.token_ids.shape[1] + 1 - self.limits.prompt_length
        scores = best.scores[:, : self.group_size] / length**self.options.length_penalty
        parents = best.parents[:, : self.group_size]
        self._add(
            group,
            scores.masked_fill(~ends, -torch.inf),
            best.log_probs,
            length,
            self.token_ids[parents],
            visible[parents],
        )
        worst = self.finished.scores[:, group, -1]
        self.group_done[:, group] |= (worst > -torch.inf) & self._cannot_improve(worst, best.scores[:, 0], length)

    def _cannot_improve(self, worst: Tensor, best_in_work: Tensor, length: int) -> Tensor:
        penalty, rule = self.options.length_penalty, self.options.early_stopping
        if rule is True:
            return torch.ones_like(worst, dtype=torch.bool)
        if rule == "never" and penalty > 0:
            length = self.limits.max_length - self.limits.prompt_length
        return worst >= best_in_work / length**penalty

    def _finish_the_rest(self, visible: Tensor) -> None:
        """There is no more room: the texts in work of groups that are not done are candidates as they are."""
        length = self.token_ids.shape[1] - self.limits.prompt_length
        shape = (*self.group_done.shape, self.group_size)
        scores = self.scores.view(shape) / length**self.options.length_penalty
        scores = scores.masked_fill(self.group_done[:, :, None], -torch.inf)
        token_ids, visible = self.token_ids.view(*shape, -1), visible.view(*shape, -1)
        for group in range(self.num_groups):
            log_probs = self.log_probs.view(shape)[:, group]
            self._add(group, scores[:, group], log_probs, length, token_ids[:, group], visible[:, group])
        self.group_done |= True

    def _add(self, group: int, scores: Tensor, log_probs: Tensor, length: int, ids: Tensor, visible: Tensor) -> None:
        """scores, log_probs (I, g), ids (I, g, T), visible (I, g, N): the best g of these and those there stay."""
        old = _Finished(*(x[:, group] for x in self.finished))
        padded = torch.full_like(old.token_ids[:, : scores.shape[1]], self.limits.eos_id)
        padded[:, :, : ids.shape[2]] = ids
        lengths = torch.full_like(scores, length, dtype=torch.int64)
        new = _Finished(scores, log_probs[:, : scores.shape[1]], lengths, padded, visible)
        both = [torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)]
        order = both[0].sort(dim=1, descending=True, stable=True).indices[:, : self.group_size]
        for kept, x in zip(self.finished, both, strict=True):
            index = order.view(*order.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
            kept[:, group] = x.gather(1, index)

    @property
    def done(self) -> Tensor:
        return self.group_done.all(dim=1)

    def results(self, images: Tensor) -> list[list[Candidate]]:
        finished = _Finished(*(x[images].flatten(1, 2) for x in self.finished))
        orders = finished.scores.argsort(dim=1, descending=True, stable=True).tolist()
        # Each way from a GPU's memory takes as long as several kernels.
        scores, log_probs, lengths, token_ids = (x.tolist() for x in finished[:4])
        found: list[list[Candidate]] = [[] for _ in orders]
        for row, image in enumerate(images.tolist()):
            for index in orders[row]:
                if scores[row][index] > -torch.inf:
                    ids = token_ids[row][index][: self.limits.prompt_length + lengths[row][index]]
                    seen = finished.visible[row, index]
                    one = Candidate(ids, log_probs[row][index], scores[row][index], image, seen)
                    found[row] += [one] * (self.options.num_groups // self.num_groups)
        return found

    def keep(self, images: Tensor) -> None:
        self.group_done = self.group_done[images]
        self.finished = _Finished(*(x[images] for x in self.finished))
        self.token_ids, self.scores, self.log_probs = (
            x.unflatten(0, (-1, self.texts_per_image))[images].flatten(0, 1)
            for x in (self.token_ids, self.scores, self.log_probs)
        )
