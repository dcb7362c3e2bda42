"""Attention over packed words for training on a CPU: short texts are padded to their like, not to the longest.

Texts of similar length form a bucket, whose length is rounded up to whole vectors of the softmax. Gathering into
buckets, attention and packing are one function with a gradient of its own, so that no intermediate is padded, copied
or summed twice. Against padding and the fused kernel, in float32 on an AMD EPYC, 1.5 to 4 times as fast over the words
of the text itself, 1.2 to 3.5 times over an image's keys (results/attention_forms.md).
Letters: B texts, I images, S packed positions, N image tokens, H heads, K key-value heads, G = H / K, d head width,
R rows of a bucket, T its length, P padded positions of all buckets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opencoca.model.kernels.dense_attention import mix, mix_backward

# The softmax works on vectors of this many floats; a row that ends within one costs several times as much.
_VECTOR = 16


@dataclass(frozen=True)
class Buckets:
    """Where packed positions stand when their rows are padded, bucket after bucket.

    shapes: rows and length of each bucket; order (B,): the rows, bucket after bucket. base (S,): padded positions
    before the position's bucket; row (S,): its row within the bucket; position (S,): its position within the row;
    length (S,): the bucket's.
    """

    shapes: tuple[tuple[int, int], ...]
    order: Tensor
    base: Tensor
    row: Tensor
    position: Tensor
    length: Tensor
    _slots: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @staticmethod
    def by_length(lengths: Tensor, rounding: int = _VECTOR) -> "Buckets":
        """Rows of these lengths (B,), packed one after another, with their like: equal when rounded up."""
        ceilings = (lengths.clamp(min=1) + rounding - 1) // rounding * rounding
        bucket_of_row = torch.zeros_like(lengths)
        row_in_bucket, base_of_row = torch.zeros_like(lengths), torch.zeros_like(lengths)
        shapes, padded = [], 0
        for ceiling in ceilings.unique().tolist():
            rows = (ceilings == ceiling).nonzero().squeeze(1)
            bucket_of_row[rows], base_of_row[rows] = ceiling, padded
            row_in_bucket[rows] = torch.arange(len(rows), device=lengths.device)
            shapes.append((len(rows), ceiling))
            padded += len(rows) * ceiling
        spread = [values.repeat_interleave(lengths) for values in (base_of_row, row_in_bucket, bucket_of_row)]
        order = ceilings.argsort(stable=True)
        return Buckets(tuple(shapes), order, spread[0], spread[1], _running_index(lengths), spread[2])

    @staticmethod
    def single(lengths: Tensor) -> "Buckets":
        """All rows, in their order, padded to the longest."""
        longest = int(lengths.max()) if len(lengths) else 0
        rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        shape = ((len(lengths), longest),)
        order = torch.arange(len(lengths), device=lengths.device)
        return Buckets(
            shape, order, torch.zeros_like(rows), rows, _running_index(lengths), torch.full_like(rows, longest)
        )

    def slots(self, num_heads: int) -> tuple[Tensor, Tensor]:
        """Places of vectors (S * H, d) in buckets (P * H, d), each bucket a flattened (R, H, T, d).

        (S * H,): where each vector stands in the buckets; (P * H,): which vector stands there, -1 where none does.
        """
        if num_heads not in self._slots:
            heads = torch.arange(num_heads, device=self.base.device)
            first = num_heads * (self.base + self.row * self.length) + self.position
            slots = (first[:, None] + heads * self.length[:, None]).flatten()
            total = num_heads * sum(rows * length for rows, length in self.shapes)
            sources = torch.full((total,), -1, device=slots.device)
            sources[slots] = torch.arange(len(slots), device=slots.device)
            self._slots[num_heads] = slots, sources
        return self._slots[num_heads]


def packed_self_attention(
    queries: Tensor, keys_values: Tensor, num_kv_heads: int, buckets: Buckets, hidden: Tensor | None = None
) -> Tensor:
    """queries (S, H, d), keys and values (S, 2, K, d) -> (S, H, d): every position sees its row up to itself.

    hidden (S,): positions that no position sees, not even they themselves; the first of a row may not be hidden.
    """
    return _PackedSelfAttention.apply(queries, keys_values, num_kv_heads, buckets, hidden)


def packed_cross_attention(queries: Tensor, keys: Tensor, values: Tensor, buckets: Buckets) -> Tensor:
    """queries (S, H, d) whose rows belong to I images, keys and values (I, K, N, d) -> (S, H, d), nothing masked."""
    return _PackedCrossAttention.apply(queries, keys, values, buckets)


class _PackedSelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys_values: Tensor, num_kv_heads: int, buckets: Buckets, hidden: Tensor | None
    ) -> Tensor:
        num_heads, head_dim = queries.shape[1:]
        slots, sources = buckets.slots(num_heads)
        padded_queries = _gather(queries.reshape(-1, head_dim), sources).mul_(head_dim**-0.5)
        sources = _key_value_sources(buckets.slots(num_kv_heads)[1], num_kv_heads)
        padded_keys, padded_values = _gather(keys_values.reshape(-1, head_dim), sources).chunk(2)
        mixed = torch.empty_like(padded_queries)
        weights = []
        biases = _biases(buckets, hidden, queries.dtype, queries.device)
        all_parts = _parts(buckets, num_heads, num_kv_heads)
        for (rows, length), parts, bias in zip(buckets.shapes, all_parts, biases, strict=True):
            q, k, v, out = _views(parts, rows, length, num_kv_heads, padded_queries, padded_keys, padded_values, mixed)
            weights.append(mix(q, k, v, out, bias))
        ctx.save_for_backward(padded_queries, padded_keys, padded_values, *weights)
        ctx.buckets, ctx.num_kv_heads = buckets, num_kv_heads
        return mixed.index_select(0, slots).view(-1, num_heads, head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        padded_queries, padded_keys, padded_values, *weights = ctx.saved_tensors
        buckets, num_kv_heads = ctx.buckets, ctx.num_kv_heads
        num_heads, head_dim = grad_outputs[0].shape[1:]
        slots, sources = buckets.slots(num_heads)
        grad_mixed = _gather_with_zeros(grad_outputs[0].reshape(-1, head_dim), sources)
        grad_queries = torch.empty_like(padded_queries)
        grad_keys_values = torch.empty(2 * len(padded_keys), head_dim, dtype=grad_queries.dtype)
        grad_keys, grad_values = grad_keys_values.chunk(2)
        all_parts = _parts(buckets, num_heads, num_kv_heads)
        for (rows, length), parts, weight in zip(buckets.shapes, all_parts, weights, strict=True):
            shape = (parts, rows, length, num_kv_heads)
            q, k, v, grad_out = _views(*shape, padded_queries, padded_keys, padded_values, grad_mixed)
            grad_q, grad_k, grad_v, _ = _views(*shape, grad_queries, grad_keys, grad_values, grad_mixed)
            mix_backward(q, k, v, weight, grad_out, grad_q, grad_k, grad_v)
        kv_slots = buckets.slots(num_kv_heads)[0].view(-1, 1, num_kv_heads)
        kv_slots = torch.cat((kv_slots, kv_slots + len(padded_keys)), dim=1).flatten()
        return (
            grad_queries.index_select(0, slots).mul_(head_dim**-0.5).view_as(grad_outputs[0]),
            grad_keys_values.index_select(0, kv_slots).view(-1, 2, num_kv_heads, head_dim),
            None,
            None,
            None,
        )


class _PackedCrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, buckets: Buckets) -> Tensor:
        num_heads, head_dim = queries.shape[1:]
        keys, values = keys.contiguous(), values.contiguous()
        slots, sources = buckets.slots(num_heads)
        padded_queries = _gather(queries.reshape(-1, head_dim), sources).mul_(head_dim**-0.5)
        mixed = torch.empty_like(padded_queries)
        batch = keys.shape[0] * keys.shape[1]
        q, k, v, out = (x.view(batch, -1, head_dim) for x in (padded_queries, keys, values, mixed))
        ctx.save_for_backward(padded_queries, keys, values, mix(q, k, v, out, None))
        ctx.buckets = buckets
        return mixed.index_select(0, slots).view(-1, num_heads, head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        padded_queries, keys, values, weights = ctx.saved_tensors
        num_heads, head_dim = grad_outputs[0].shape[1:]
        slots, sources = ctx.buckets.slots(num_heads)
        grad_mixed = _gather_with_zeros(grad_outputs[0].reshape(-1, head_dim), sources)
        grads = [torch.empty_like(tensor) for tensor in (padded_queries, keys, values)]
        batch = keys.shape[0] * keys.shape[1]
        q, k, v = (x.view(batch, -1, head_dim) for x in (padded_queries, keys, values))
        grad_q, grad_k, grad_v = (x.view(batch, -1, head_dim) for x in grads)
        mix_backward(q, k, v, weights, grad_mixed.view(batch, -1, head_dim), grad_q, grad_k, grad_v)
        grad_queries = grads[0].index_select(0, slots).mul_(head_dim**-0.5)
        return grad_queries.view_as(grad_outputs[0]), grads[1], grads[2], None


def _parts(buckets: Buckets, num_heads: int, num_kv_heads: int) -> list[tuple[slice, slice]]:
    """The slices that the queries and the keys of each bucket take in the flattened buckets."""
    parts, start = [], 0
    for rows, length in buckets.shapes:
        stop = start + rows * length
        parts.append((slice(num_heads * start, num_heads * stop), slice(num_kv_heads * start, num_kv_heads * stop)))
        start = stop
    return parts


def _views(
    parts: tuple[slice, slice],
    rows: int,
    length: int,
    num_kv_heads: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mixed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One bucket of each: (R * K, G * T, d) of queries and mixed, (R * K, T, d) of keys and values."""
    batch, head_dim = rows * num_kv_heads, queries.shape[-1]
    return (
        queries[parts[0]].view(batch, -1, head_dim),
        keys[parts[1]].view(batch, length, head_dim),
        values[parts[1]].view(batch, length, head_dim),
        mixed[parts[0]].view(batch, -1, head_dim),
    )


def _key_value_sources(sources: Tensor, num_kv_heads: int) -> Tensor:
    """From which of S * K vectors stands where, which of S * 2 * K: all keys, then all values."""
    position, head = sources.div(num_kv_heads, rounding_mode="floor"), sources % num_kv_heads
    keys = (2 * position * num_kv_heads + head).masked_fill_(sources < 0, -1)
    return torch.cat((keys, keys + num_kv_heads * (keys >= 0)))


def _gather(vectors: Tensor, sources: Tensor) -> Tensor:
    # Whatever stands in the padding, no word sees it and its result is dropped.
    return vectors.index_select(0, sources.clamp(min=0))


def _gather_with_zeros(vectors: Tensor, sources: Tensor) -> Tensor:
    return _gather(vectors, sources).index_fill_(0, (sources < 0).nonzero().squeeze(1), 0)


def _biases(buckets: Buckets, hidden: Tensor | None, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Yields for each bucket (R or 1, T, T): 0 where a position sees another, -inf elsewhere."""
    # Padding is not hidden: behind every word, it is seen by padding alone.
    hides = None if hidden is None else hidden[buckets.slots(1)[1].clamp(min=0)] & (buckets.slots(1)[1] >= 0)
    start = 0
    for rows, length in buckets.shapes:
        bias = torch.full((1, length, length), -torch.inf, dtype=dtype, device=device).triu_(1)
        if hides is not None:
            keys = hides[start : start + rows * length].view(rows, 1, length)
            bias = bias.expand(rows, -1, -1).masked_fill(keys, -torch.inf)
        start += rows * length
        yield bias


def _running_index(lengths: Tensor) -> Tensor:
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=lengths.device) - starts.repeat_interleave(lengths)
