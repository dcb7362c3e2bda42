"""The gradient of a step's whole batch, in parts that fit memory, each process computing its share.

A batch is cut into micro-batches (accumulation_steps), each with contrastive negatives of its own, and a micro-batch
into sub-batches (grad_cache_steps), which share their negatives: a first pass without graph collects all embeddings,
the loss gives the gradient by each, and a second pass takes it through the network, sub-batch by sub-batch (GradCache,
arXiv 2101.06983). Every process computes its part of each; the parts of losses and gradients add up.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opencoca.data import Batch
from opencoca.tasks.task import Compared, Losses, Outputs, divided
from opencoca.train.compute import autocast
from opencoca.train.parallel import ParallelModel
from opencoca.train.recipe.recipe import Recipe


class BatchLosses(NamedTuple):
    """Losses of a step's whole batch, detached, and its numbers of samples and of tokens, over all processes."""

    losses: Losses
    samples: int
    tokens: int


class _SubBatch(NamedTuple):
    """A part of a step; number: within the step, is_last: whether the step's last backward pass is this part's."""

    batch: Batch
    number: int
    is_last: bool


class _Whole(NamedTuple):
    """What a part of the loss is measured by.

    share: the part of the step's samples that the micro-batch has; counts: of the step, over all processes; step: its
    number.
    """

    share: float
    counts: dict[str, int]
    step: int


class _CachedGradient(NamedTuple):
    """The gradient of the weighted terms across the batch by one sub-batch's embeddings, and by what is shared."""

    rows: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]

    def backward_through(self, compared: Compared) -> Tensor:
        """A scalar whose gradient takes this one through the network."""
        terms = [(embed * grad).sum() for embed, grad in zip(compared.rows, self.rows, strict=True)]
        total = torch.stack(terms).sum()
        for value, grad in zip(compared.shared, self.shared, strict=True):
            total = total + value * grad
        return total


class BatchGradient:
    """Adds the gradient of a batch to the parameters' gradients."""

    def __init__(self, parallel: ParallelModel, recipe: Recipe):
        self.parallel, self.recipe, self.task, self.world = parallel, recipe, parallel.task, parallel.world
        self._across_batch = any(term.across_batch for term in self.task.terms)

    def __call__(self, batch: Batch, step: int) -> BatchLosses:
        """Backward of all of batch, this process's part of step ``step``.

        A term across the batch counts by the samples of its micro-batch, others by what they are averaged over.
        Dropout is a pure function of (seed, step, process, sub-batch).
        """
        per_micro = self.recipe.grad_cache_steps
        micro_batches = batch.micro_batches(self.recipe.accumulation_steps)
        parts = [part for micro in micro_batches for part in micro.split(per_micro)]
        own = self.task.counts(batch)
        *sizes, tokens, samples = self.world.sum_counts(
            [part.num_samples for part in parts] + list(own.values()) + [batch.num_tokens, batch.num_samples]
        )
        sizes, totals = sizes[: len(parts)], sizes[len(parts) :]
        counts = dict(zip(own, totals, strict=True))
        # Where no process has a sample, none runs the network; where some have, all do.
        numbers = [number for number, size in enumerate(sizes) if size]
        values = self._no_values()
        for first in range(0, len(parts), per_micro):
            subs = [
                _SubBatch(parts[number].to(self.parallel.device), number, number == numbers[-1])
                for number in numbers
                if first <= number < first + per_micro
            ]
            if subs:
                share = sum(sizes[sub.number] for sub in subs) / sum(sizes)
                values += self._micro_batch(subs, _Whole(share, counts, step))
        self.parallel.finish_gradients()
        by_name = dict(zip((term.name for term in self.task.terms), self.world.sum(values), strict=True))
        return BatchLosses(Losses.weighted(self.task.terms, by_name), samples, tokens)

    def _no_values(self) -> Tensor:
        return torch.zeros(len(self.task.terms), dtype=torch.float64, device=self.parallel.device)

    def _micro_batch(self, subs: list[_SubBatch], whole: _Whole) -> Tensor:
        """Backward of one micro-batch; its part of every term (terms,)."""
        values, cached = self._no_values(), None
        if len(subs) > 1 and self._across_batch:
            cached, found = self._cached_gradients(subs, whole)
            values += self._as_values(found)
        for index, sub in enumerate(subs):
            values += self._sub_batch(sub, cached[index] if cached else None, whole)
        return values

    def _sub_batch(self, sub: _SubBatch, cached: _CachedGradient | None, whole: _Whole) -> Tensor:
        """Forward and backward; the terms (terms,) that are computed here and not by `_cached_gradients`."""
        self._seed(whole.step, sub)
        with self.parallel.adding_up(sub.is_last):
            with autocast(self.parallel.device, self.recipe.precision):
                outputs = self._forward(sub)
                found, terms = {}, []
                if outputs.compared is not None and cached is not None:
                    terms.append(cached.backward_through(outputs.compared))
                elif outputs.compared is not None:
                    found |= self._compare(outputs.compared, whole)
                sums = self.task.losses(self.parallel.model, outputs, sub.batch)
                found |= divided(self.task.terms, sums, whole.counts)
                if found:
                    terms.append(Losses.weighted(self.task.terms, found).total)
            torch.stack(terms).sum().backward()
        return self._as_values(found)

    def _cached_gradients(
        self, subs: list[_SubBatch], whole: _Whole
    ) -> tuple[list[_CachedGradient], dict[str, Tensor]]:
        """The first pass: the gradient by every sub-batch's embeddings, and the terms across the batch."""
        parts: list[Compared] = []
        with torch.no_grad(), autocast(self.parallel.device, self.recipe.precision):
            for sub in subs:
                self._seed(whole.step, sub)
                compared = self._forward(sub, compared_only=True).compared
                assert compared is not None
                parts.append(compared)
        rows = [torch.cat(kind).requires_grad_() for kind in zip(*(part.rows for part in parts), strict=True)]
        ids = tuple(torch.cat(kind) for kind in zip(*(part.ids for part in parts), strict=True))
        shared = [value.clone().requires_grad_() for value in parts[-1].shared]
        found = self._compare(Compared(tuple(rows), ids, tuple(shared)), whole)
        grads = torch.autograd.grad(Losses.weighted(self.task.terms, found).total, [*rows, *shared])
        sizes = [[len(kind) for kind in part.rows] for part in parts]
        by_kind = [grad.split([size[kind] for size in sizes]) for kind, grad in enumerate(grads[: len(rows)])]
        # What is shared is one for all: the last sub-batch, whose gradients are added up, takes its gradient.
        last = tuple(grads[len(rows) :])
        others = tuple(torch.zeros_like(grad) for grad in last)
        cached = [
            _CachedGradient(of_rows, last if index == len(subs) - 1 else others)
            for index, of_rows in enumerate(zip(*by_kind, strict=True))
        ]
        return cached, found

    def _compare(self, compared: Compared, whole: _Whole) -> dict[str, Tensor]:
        found = self.task.compare(compared, self.world)
        return {name: whole.share * value for name, value in found.items()}

    def _forward(self, sub: _SubBatch, compared_only: bool = False) -> Outputs:
        """The network's outputs for a sub-batch.

        For an empty one they have no rows, but a graph: where processes gather weights and add up gradients together,
        each must run the network as often as the others.
        """
        if sub.batch.num_samples:
            return self.parallel.forward(sub.batch, compared_only)
        return _without_rows(self.parallel.forward(sub.batch.stand_in(), compared_only))

    def _as_values(self, found: dict[str, Tensor]) -> Tensor:
        zero = torch.zeros((), device=self.parallel.device)
        return torch.stack([found.get(term.name, zero).detach().double() for term in self.task.terms])

    def _seed(self, step: int, sub: _SubBatch) -> None:
        """Both passes over a sub-batch draw the same random numbers."""
        source = np.random.SeedSequence([self.recipe.seed, step, self.world.rank, sub.number])
        torch.manual_seed(int(source.generate_state(1, np.uint64)[0]))


def _without_rows(outputs: Outputs) -> Outputs:
    """The outputs cut to no rows; scalars stay."""

    def cut(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor[:0] for tensor in tensors)

    compared = outputs.compared
    if compared is not None:
        compared = Compared(cut(compared.rows), cut(compared.ids), compared.shared)
    return Outputs(compared, cut(outputs.own))
