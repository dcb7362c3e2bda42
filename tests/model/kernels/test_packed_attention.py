"""Attention over packed words against a loop over texts in float64, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opencoca.model.kernels.packed_attention import Buckets, PackedSelfAttention, packed_cross_attention

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3)])


def softmax_attention(
    queries: Tensor, keys: Tensor, values: Tensor, causal: bool, hidden: Tensor | None = None
) -> Tensor:
    """queries (T, H, d), keys and values (N, K, d) -> (T, H, d), one head and query after another; hidden (N,)."""
    group = queries.shape[1] // keys.shape[1]
    rows = []
    for position, query in enumerate(queries):
        heads = []
        for head, vector in enumerate(query):
            seen = torch.arange(len(keys)) <= position if causal else torch.ones(len(keys)).bool()
            if hidden is not None:
                seen = seen & ~hidden
            weights = (keys[seen, head // group] @ vector / vector.shape[0] ** 0.5).softmax(dim=0)
            heads.append(weights @ values[seen, head // group])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def assert_same_values_and_gradients(ours: Tensor, reference: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for got, want in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(reference, inputs, direction), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, HEADS)
def test_self_attention_equals_a_loop_over_texts(lengths: list[int], heads: tuple[int, int]):
    queries = torch.randn(sum(lengths), heads[0], 6, dtype=torch.float64, requires_grad=True)
    keys_values = torch.randn(sum(lengths), 2, heads[1], 6, dtype=torch.float64, requires_grad=True)
    ours = PackedSelfAttention.apply(queries, keys_values, Buckets.of(torch.tensor(lengths)), None)
    texts = zip(queries.split(lengths), keys_values.split(lengths), strict=True)
    reference = torch.cat([softmax_attention(q, kv[:, 0], kv[:, 1], causal=True) for q, kv in texts])
    assert_same_values_and_gradients(ours, reference, (queries, keys_values))


@settings(max_examples=25, deadline=None)
@given(LENGTHS, HEADS, st.floats(0, 1))
def test_what_is_hidden_is_seen_by_no_position(lengths: list[int], heads: tuple[int, int], share: float):
    queries = torch.randn(sum(lengths), heads[0], 6, dtype=torch.float64, requires_grad=True)
    keys_values = torch.randn(sum(lengths), 2, heads[1], 6, dtype=torch.float64, requires_grad=True)
    hidden = [torch.rand(length) < share for length in lengths]
    for text in hidden:
        text[0] = False
    buckets = Buckets.of(torch.tensor(lengths))
    ours = PackedSelfAttention.apply(queries, keys_values, buckets, torch.cat(hidden))
    texts = zip(queries.split(lengths), keys_values.split(lengths), hidden, strict=True)
    reference = torch.cat([softmax_attention(q, kv[:, 0], kv[:, 1], True, out) for q, kv, out in texts])
    assert_same_values_and_gradients(ours, reference, (queries, keys_values))


@settings(max_examples=25, deadline=None)
@given(LENGTHS, HEADS, st.integers(1, 7))
def test_cross_attention_equals_a_loop_over_images(lengths: list[int], heads: tuple[int, int], num_tokens: int):
    queries = torch.randn(sum(lengths), heads[0], 6, dtype=torch.float64, requires_grad=True)
    keys, values = torch.randn(2, len(lengths), heads[1], num_tokens, 6, dtype=torch.float64).requires_grad_().unbind()
    ours = packed_cross_attention(queries, keys, values, Buckets.of(torch.tensor(lengths), None))
    images = zip(queries.split(lengths), keys.transpose(1, 2), values.transpose(1, 2), strict=True)
    reference = torch.cat([softmax_attention(q, k, v, causal=False) for q, k, v in images])
    assert_same_values_and_gradients(ours, reference, (queries, keys, values))


@given(st.lists(st.integers(0, 70), min_size=1, max_size=30).filter(any))
def test_every_position_has_a_slot_of_its_own_in_a_bucket_of_its_length(lengths: list[int]):
    buckets = Buckets.of(torch.tensor(lengths))
    assert sum(rows for rows, _ in buckets.shapes) == len(lengths)
    assert all(
        ceiling - 16 < length <= ceiling
        for length, ceiling in zip(
            torch.tensor(lengths).repeat_interleave(torch.tensor(lengths)).tolist(),
            buckets.length.tolist(),
            strict=True,
        )
    )
    for parts in (1, 2):
        slots, sources, padding = buckets.places(3, parts)
        assert len(slots) == 3 * parts * sum(lengths)
        assert torch.equal(sources[slots], torch.arange(len(slots)))
        assert sorted([*slots.tolist(), *padding.tolist()]) == list(range(len(sources)))


@pytest.mark.parametrize("hidden", [None, torch.tensor([False, True, False, False, True])], ids=["", "hidden"])
def test_empty_texts_take_part_in_nothing(hidden: Tensor | None):
    queries, keys_values = torch.randn(5, 2, 4), torch.randn(5, 2, 2, 4)
    with_empty = PackedSelfAttention.apply(queries, keys_values, Buckets.of(torch.tensor([0, 3, 0, 2])), hidden)
    without = PackedSelfAttention.apply(queries, keys_values, Buckets.of(torch.tensor([3, 2])), hidden)
    torch.testing.assert_close(with_empty, without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near_float64(dtype: torch.dtype):
    lengths = torch.tensor([9, 20, 33])
    queries, keys_values = torch.randn(62, 2, 8).to(dtype), torch.randn(62, 2, 2, 8).to(dtype)
    ours = PackedSelfAttention.apply(queries, keys_values, Buckets.of(lengths), None)
    exact = PackedSelfAttention.apply(queries.double(), keys_values.double(), Buckets.of(lengths), None)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=0.02, atol=0.02)
