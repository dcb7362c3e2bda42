"""The quick selection against the plain one."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from opencoca.generation.top_candidates import top_candidates


@given(
    seed=st.integers(0, 10_000),
    num_rows=st.integers(1, 4),
    vocab_size=st.integers(13, 3000),
    k=st.integers(1, 13),
    forbidden=st.floats(0, 1),
)
def test_equals_topk(seed, num_rows, vocab_size, k, forbidden):
    generator = torch.Generator().manual_seed(seed)
    # Distinct, so that the ids are certain too.
    scores = torch.stack([torch.randperm(vocab_size, generator=generator).double() for _ in range(num_rows)])
    values, ids = top_candidates(scores, k)
    expected = scores.topk(k, dim=1)
    torch.testing.assert_close(values, expected.values, rtol=0, atol=0)
    torch.testing.assert_close(ids, expected.indices, rtol=0, atol=0)
    scores[torch.rand(scores.shape, generator=generator) < forbidden] = -torch.inf
    values, ids = top_candidates(scores, k)
    torch.testing.assert_close(values, scores.topk(k, dim=1).values, rtol=0, atol=0)
    torch.testing.assert_close(scores.gather(1, ids), values, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in ids.tolist())
