"""Packing of the real words: nothing lost, order kept, padding zero."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from opencoca.model.layers.layout import TextLayout

masks = st.tuples(st.integers(1, 5), st.integers(0, 6)).flatmap(
    lambda shape: st.lists(
        st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
)


@given(masks)
def test_words_keep_their_order_and_padding_is_zero(rows: list[list[bool]]):
    mask = torch.tensor(rows, dtype=torch.bool).view(len(rows), -1)
    layout = TextLayout.of(mask.sum(dim=1))
    lengths = [sum(row) for row in rows]
    assert (layout.batch_size, layout.length) == (len(rows), max(lengths))
    assert layout.positions.tolist() == [position for length in lengths for position in range(length)]
    # Words are numbered from 1, so that a zero is padding.
    packed = torch.arange(1, sum(lengths) + 1).unsqueeze(1).repeat(1, 2)
    padded = layout.pad(packed)
    assert padded.shape == (len(rows), max(lengths), 2)
    word = iter(range(1, sum(lengths) + 1))
    expected = [[next(word) if column < length else 0 for column in range(max(lengths))] for length in lengths]
    assert padded[..., 0].tolist() == expected
    assert torch.equal(layout.pack(padded), packed)


@given(st.integers(1, 4), st.integers(0, 5))
def test_texts_of_one_length_have_no_padding(batch_size: int, length: int):
    layout = TextLayout.of(torch.full((batch_size,), length))
    assert layout.slots is None
    x = torch.randn(batch_size * length, 3)
    assert torch.equal(layout.pad(x), x.view(batch_size, length, 3))
    assert torch.equal(layout.pack(layout.pad(x)), x)


def test_gradients_pass_through_and_none_comes_from_padding():
    layout = TextLayout.of(torch.tensor([2, 1]))
    packed = torch.randn(3, 2, requires_grad=True)
    weights = torch.randn(2, 2, 2)
    (layout.pad(packed) * weights).sum().backward()
    assert torch.equal(packed.grad, torch.stack((weights[0, 0], weights[0, 1], weights[1, 0])))
