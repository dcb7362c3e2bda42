"""Attention over packed words for training on a CPU: short texts are padded to their like, not to the longest.

Texts of similar length form a bucket, whose length is rounded up to whole vectors of the softmax. Over the words of the
text itself, gathering into buckets, attention and packing are one function with a gradient of its own, so that no
intermediate is padded, copied or summed twice. Against padding and the fused kernel, in float32 on an AMD EPYC, 1.5 to
4 times as fast over these words, 1.2 to 3.5 times over an image's keys (results/attention_forms.md).
Letters: B texts, I images, S packed positions, N image tokens, H heads, K key-value heads, G = H / K, d head width,
R rows of a bucket, T its length, P padded positions of all buckets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opencoca.model.kernels.dense_attention import DenseAttention, mix, mix_backward

# The softmax works on vectors of this many floats; a row that ends within one costs several times as much.
_VECTOR = 16


class Places(NamedTuple):
    """Where packed vectors stand in buckets.

    slots: the place of each vector in the buckets; sources: for each place, which vector stands there (any, where none
    does); padding: the places where none does.
    """

    slots: Tensor
    sources: Tensor
    padding: Tensor


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
    _places: dict[tuple[int, int], Places] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(lengths: Tensor, rounding: int | None = _VECTOR) -> "Buckets":
        """Rows of these lengths (B,), packed one after another: those equal when rounded up share a bucket.

        rounding: to a multiple of this; None = to the longest, so that all rows are in one bucket.
        """
        if rounding is None:
            ceilings = lengths.max().expand(lengths.shape) if len(lengths) else lengths
        else:
            ceilings = (lengths.clamp(min=1) + rounding - 1) // rounding * rounding
        row_in_bucket, base_of_row = torch.zeros_like(lengths), torch.zeros_like(lengths)
        shapes, padded = [], 0
        for ceiling in ceilings.unique().tolist():
            rows = (ceilings == ceiling).nonzero().squeeze(1)
            base_of_row[rows] = padded
            row_in_bucket[rows] = torch.arange(len(rows), device=lengths.device)
            shapes.append((len(rows), ceiling))
            padded += len(rows) * ceiling
        base, row, length = (x.repeat_interleave(lengths) for x in (base_of_row, row_in_bucket, ceilings))
        order = ceilings.argsort(stable=True)
        return Buckets(tuple(shapes), order, base, row, running_index(lengths), length)

    def places(self, num_heads: int, parts: int = 1) -> Places:
        """Places of vectors (S * parts * H, d) in buckets (parts * P * H, d), each bucket a flattened (R, H, T, d).

        parts: how many kinds of vectors a position has (keys and values: 2); in the buckets, one kind follows another.
        """
        if (num_heads, parts) not in self._places:
            total = num_heads * sum(rows * length for rows, length in self.shapes)
            device = self.base.device
            first = num_heads * (self.base + self.row * self.length) + self.position
            kinds = torch.arange(parts, device=device)[:, None] * total
            heads = torch.arange(num_heads, device=device) * self.length[:, None, None]
            slots = (first[:, None, None] + kinds + heads).flatten()
            sources = torch.full((parts * total,), -1, dtype=torch.int64, device=device)
            sources[slots] = torch.arange(len(slots), device=device)
            padding = (sources < 0).nonzero().squeeze(1)
            self._places[num_heads, parts] = Places(slots, sources.clamp_(min=0), padding)
        return self._places[num_heads, parts]


def running_index(lengths: Tensor) -> Tensor:
    """lengths (B,) of rows, one after another -> (S,): each position within its row, from 0."""
    starts, total = lengths.cumsum(0) - lengths, int(lengths.sum())
    return torch.arange(total, device=lengths.device) - starts.repeat_interleave(lengths, output_size=total)


class PackedSelfAttention(torch.autograd.Function):
    """queries (S, H, d), keys and values (S, 2, K, d), buckets -> (S, H, d): every position sees its row up to itself.

    hidden (S,): positions that no position sees, not even they themselves; the first of a row may not be hidden.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys_values: Tensor, buckets: Buckets, hidden: Tensor | None) -> Tensor:
        (_, num_heads, head_dim), num_kv_heads = queries.shape, keys_values.shape[2]
        places, kv_places = buckets.places(num_heads), buckets.places(num_kv_heads, 2)
        # Whatever stands in the padding, no word sees it and its result is dropped.
        padded_queries = queries.reshape(-1, head_dim).index_select(0, places.sources).mul_(head_dim**-0.5)
        keys, values = keys_values.reshape(-1, head_dim).index_select(0, kv_places.sources).chunk(2)
        mixed, weights, hides = torch.empty_like(padded_queries), [], None
        if hidden is not None:
            # Padding counts as the first word, which is not hidden: a row of padding alone must see something.
            hides = hidden[buckets.places(1).sources].split([rows * length for rows, length in buckets.shapes])
        parts = _by_bucket(buckets, num_kv_heads, padded_queries, keys, values, mixed)
        for number, ((rows, length), (q, k, v, out)) in enumerate(zip(buckets.shapes, parts, strict=True)):
            bias = q.new_full((1, length, length), -torch.inf).triu_(1)
            if hides is not None:
                bias = bias.expand(rows, -1, -1).masked_fill(hides[number].view(rows, 1, length), -torch.inf)
            weights.append(mix(q, k, v, out, bias))
        ctx.save_for_backward(padded_queries, keys, values, *weights)
        ctx.buckets, ctx.num_kv_heads = buckets, num_kv_heads
        return mixed.index_select(0, places.slots).view(-1, num_heads, head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        padded_queries, keys, values, *weights = ctx.saved_tensors
        buckets, num_kv_heads = ctx.buckets, ctx.num_kv_heads
        num_heads, head_dim = grad_outputs[0].shape[1:]
        places, kv_places = buckets.places(num_heads), buckets.places(num_kv_heads, 2)
        grad_mixed = grad_outputs[0].reshape(-1, head_dim).index_select(0, places.sources)
        grad_mixed.index_fill_(0, places.padding, 0)
        grad_queries = torch.empty_like(padded_queries)
        grad_keys_values = torch.empty(2 * len(keys), head_dim, dtype=grad_queries.dtype)
        tensors = padded_queries, keys, values, grad_mixed, grad_queries, *grad_keys_values.chunk(2)
        parts = _by_bucket(buckets, num_kv_heads, *tensors)
        for weight, (q, k, v, grad_out, *grads) in zip(weights, parts, strict=True):
            mix_backward(q, k, v, weight, grad_out, grads)
        return (
            grad_queries.index_select(0, places.slots).mul_(head_dim**-0.5).view_as(grad_outputs[0]),
            grad_keys_values.index_select(0, kv_places.slots).view(-1, 2, num_kv_heads, head_dim),
            None,
            None,
        )


def packed_cross_attention(queries: Tensor, keys: Tensor, values: Tensor, buckets: Buckets) -> Tensor:
    """queries (S, H, d) in rows of I images, keys and values (I, K, N, d), one bucket -> (S, H, d), nothing masked."""
    num_heads, head_dim = queries.shape[1:]
    ((rows, length),) = buckets.shapes
    slots = buckets.places(num_heads).slots
    padded = PutRows.apply(queries.reshape(-1, head_dim), slots, rows * num_heads * length)
    mixed = DenseAttention.apply(padded.view(rows, num_heads, length, head_dim), keys, values)
    return TakeRows.apply(mixed.view(-1, head_dim), slots).view(queries.shape)


class TakeRows(torch.autograd.Function):
    """x (R, ...) and distinct rows (S,) -> (S, ...).

    The gradient of a general gather must add up what was taken twice; here, where nothing is, it is a copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


class PutRows(torch.autograd.Function):
    """x (S, ...) and distinct rows (S,) -> (num_rows, ...) with x in these rows and zeros in the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0].index_select(0, ctx.saved_tensors[0]), None, None


def _by_bucket(buckets: Buckets, num_kv_heads: int, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yields for each bucket its part of each tensor: of queries (H P, d) (R * K, G * T, d), of keys (R * K, T, d)."""
    total, start = sum(rows * length for rows, length in buckets.shapes), 0
    for rows, length in buckets.shapes:
        stop = start + rows * length
        parts = (tensor[len(tensor) // total * start : len(tensor) // total * stop] for tensor in tensors)
        yield [part.view(rows * num_kv_heads, -1, part.shape[-1]) for part in parts]
        start = stop
