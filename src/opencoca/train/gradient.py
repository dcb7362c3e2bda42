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
from opencoca.tasks.task import Compared, Outputs
from opencoca.train.compute import autocast
from opencoca.train.parallel import ParallelModel
from opencoca.train.recipe.recipe import Recipe


class BatchLosses(NamedTuple):
    """The losses of a step's whole batch, over all processes, detached.

    total: the weighted sum of the terms; terms: each by name, without its weight. samples, tokens: how many there are.
    """

    total: Tensor
    terms: dict[str, Tensor]
    samples: int
    tokens: int


class _SubBatch(NamedTuple):
    """A part of a step.

    seed: what its random numbers are drawn with; share: the part of the step's samples that its micro-batch has;
    is_last: whether the step's last backward pass is this part's.
    """

    batch: Batch
    seed: np.random.SeedSequence
    share: float
    is_last: bool


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
        self._autocast = autocast(parallel.device, recipe.precision)
        self._caches = recipe.grad_cache_steps > 1 and any(term.across_batch for term in self.task.terms)

    def __call__(self, batch: Batch, step: int) -> BatchLosses:
        """Backward of all of batch, this process's part of step ``step``.

        A term across the batch counts by the samples of its micro-batch, others by what they are averaged over.
        Dropout is a pure function of (seed, step, process, sub-batch).
        """
        recipe, terms, device, per_micro = (
            self.recipe,
            self.task.terms,
            self.parallel.device,
            self.recipe.grad_cache_steps,
        )
        parts = [part for micro in batch.split(recipe.accumulation_steps) for part in micro.split(per_micro)]
        own = self.task.counts(batch)
        counts = [part.num_samples for part in parts] + [*own.values(), batch.num_tokens]
        *sums, tokens = self.world.sum(torch.tensor(counts, dtype=torch.int64, device=self.world.device)).tolist()
        sizes, totals = sums[: len(parts)], dict(zip(own, sums[len(parts) :], strict=True))
        divisors = {term.name: max(1, totals[term.per]) if term.per else 1 for term in terms}
        # Where no process has a sample, none runs the network; where some have, all do.
        used = [number for number, size in enumerate(sizes) if size]
        values = {term.name: torch.zeros((), dtype=torch.float64, device=device) for term in terms}
        for first in range(0, len(parts), per_micro):
            numbers = [number for number in used if first <= number < first + per_micro]
            share = sum(sizes[number] for number in numbers) / max(1, sum(sizes))
            subs = [
                _SubBatch(
                    parts[number].to(device),
                    np.random.SeedSequence([recipe.seed, step, self.world.rank, number]),
                    share,
                    number == used[-1],
                )
                for number in numbers
            ]
            cached = self._cached_gradients(subs, values) if self._caches and len(subs) > 1 else [None] * len(subs)
            for sub, gradient in zip(subs, cached, strict=True):
                self._backward(sub, gradient, divisors, values)
        summed = self.world.sum(torch.stack([values[term.name] for term in terms]))
        total = torch.stack([term.weight * value for term, value in zip(terms, summed, strict=True)]).sum()
        return BatchLosses(total, dict(zip(values, summed, strict=True)), sum(sizes), tokens)

    def _backward(
        self, sub: _SubBatch, cached: _CachedGradient | None, divisors: dict[str, int], values: dict[str, Tensor]
    ) -> None:
        """Forward and backward; adds the terms that are computed here, and not by `_cached_gradients`, to values."""
        with self.parallel.adding_up(sub.is_last):
            with self._autocast:
                outputs, found = self._forward(sub), {}
                if outputs.compared is not None and cached is None:
                    across = self.task.compare(outputs.compared, self.world)
                    found = {name: sub.share * value for name, value in across.items()}
                sums = self.task.losses(self.parallel.model, outputs, sub.batch)
                found |= {name: value / divisors[name] for name, value in sums.items()}
                weighted = [term.weight * found[term.name] for term in self.task.terms if term.name in found]
                if outputs.compared is not None and cached is not None:
                    weighted.append(cached.backward_through(outputs.compared))
            torch.stack(weighted).sum().backward()
        for name, value in found.items():
            values[name] += value.detach()

    def _cached_gradients(self, subs: list[_SubBatch], values: dict[str, Tensor]) -> list[_CachedGradient]:
        """The first pass: the gradient by every sub-batch's embeddings; adds the terms across the batch to values."""
        parts: list[Compared] = []
        with torch.no_grad(), self._autocast:
            for sub in subs:
                compared = self._forward(sub, compared_only=True).compared
                assert compared is not None
                parts.append(compared)
        rows = [torch.cat(kind).requires_grad_() for kind in zip(*(part.rows for part in parts), strict=True)]
        shared = [value.clone().requires_grad_() for value in parts[-1].shared]
        sample_ids = torch.cat([part.sample_ids for part in parts])
        across = self.task.compare(Compared(tuple(rows), sample_ids, tuple(shared)), self.world)
        found = {name: subs[0].share * value for name, value in across.items()}
        weighted = [term.weight * found[term.name] for term in self.task.terms if term.name in found]
        grads = torch.autograd.grad(torch.stack(weighted).sum(), [*rows, *shared])
        for name, value in found.items():
            values[name] += value.detach()
        sizes = [[len(kind) for kind in part.rows] for part in parts]
        by_kind = [grad.split([size[kind] for size in sizes]) for kind, grad in enumerate(grads[: len(rows)])]
        # What is shared is one for all: the last sub-batch, whose gradients are added up, takes its gradient.
        last = tuple(grads[len(rows) :])
        others = tuple(torch.zeros_like(grad) for grad in last)
        by_part = list(zip(*by_kind, strict=True))
        return [*(_CachedGradient(of_rows, others) for of_rows in by_part[:-1]), _CachedGradient(by_part[-1], last)]

    def _forward(self, sub: _SubBatch, compared_only: bool = False) -> Outputs:
        """The network's outputs for a sub-batch; both passes over it draw the same random numbers.

        For an empty one they have no rows, but a graph: where processes gather weights and add up gradients together,
        each must run the network as often as the others.
        """
        torch.manual_seed(int(sub.seed.generate_state(1, np.uint64)[0]))
        if sub.batch.num_samples:
            return self.parallel.network(sub.batch, compared_only)
        return _without_rows(self.parallel.network(sub.batch.stand_in(), compared_only))


def _without_rows(outputs: Outputs) -> Outputs:
    """The outputs cut to no rows; scalars stay."""

    def cut(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor[:0] for tensor in tensors)

    compared = outputs.compared
    if compared is not None:
        compared = Compared(cut(compared.rows), compared.sample_ids[:0], compared.shared)
    return Outputs(compared, cut(outputs.own))
