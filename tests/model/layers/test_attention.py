"""Attention against a written-out float64 softmax, its two paths against each other, rotary positions, the cache."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opencoca.model.config import BlockConfig
from opencoca.model.kernels.choice import CAUSAL, EVERYTHING, Mask
from opencoca.model.layers.attention import Attention, OwnWords, Padded, SeenImages, attend, rotary_angles, rotate
from opencoca.model.layers.layout import TextLayout


def naive_attention(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    """One query at a time: (B, H, T, d) over (B, K, N, d)."""
    batch_size, num_heads, length, head_dim = queries.shape
    group = num_heads // keys.shape[1]
    out = torch.zeros_like(queries)
    for b in range(batch_size):
        for h in range(num_heads):
            for t in range(length):
                seen = keys.shape[2] - (length - 1 - t) if causal else keys.shape[2]
                k, v = keys[b, h // group, :seen], values[b, h // group, :seen]
                weights = [math.exp(float(queries[b, h, t] @ key) / math.sqrt(head_dim)) for key in k]
                out[b, h, t] = sum(w * value for w, value in zip(weights, v, strict=True)) / sum(weights)
    return out


CASES = [
    # heads, key-value heads, queries, keys, causal
    (4, 4, 5, 5, True),
    (4, 2, 5, 5, True),
    (4, 1, 5, 5, True),
    (4, 4, 3, 7, True),
    (4, 2, 3, 7, True),
    (4, 1, 1, 7, True),
    (4, 4, 5, 3, False),
    (4, 2, 1, 6, False),
    (6, 3, 4, 4, False),
    (2, 1, 1, 1, True),
]


def qkv(heads: int, kv_heads: int, length: int, num_keys: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, heads, length, 6), (2, kv_heads, num_keys, 6), (2, kv_heads, num_keys, 6))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)  # pyright: ignore[reportReturnType]


def over(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    return attend(queries.transpose(1, 2), Padded(keys, values), CAUSAL if causal else EVERYTHING).transpose(1, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_paths_equal_the_written_out_softmax(case):
    *shape, causal = case
    queries, keys, values = qkv(*shape)
    expected = naive_attention(queries, keys, values, causal)
    with torch.no_grad():
        torch.testing.assert_close(over(queries, keys, values, causal), expected)
    with_gradient = over(queries.requires_grad_(), keys, values, causal)
    torch.testing.assert_close(with_gradient, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_path_has_the_kernels_gradients(case):
    heads, kv_heads, length, num_keys, causal = case
    ours = [x.requires_grad_() for x in qkv(heads, kv_heads, length, num_keys)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    upstream = torch.randn_like(ours[0])
    over(ours[0], ours[1], ours[2], causal).backward(upstream)
    group = heads // kv_heads
    queries, keys, values = theirs[0], *(x.repeat_interleave(group, dim=1) for x in theirs[1:])
    mask = torch.ones(length, num_keys, dtype=torch.bool).tril(num_keys - length) if causal else None
    F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).backward(upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frozen_queries_give_keys_the_same_gradients(case):
    *shape, causal = case
    queries, keys, values = qkv(*shape)
    gradients = []
    for frozen in (False, True):
        keys, values = keys.detach().requires_grad_(), values.detach().requires_grad_()
        over(queries.detach().requires_grad_(not frozen), keys, values, causal).square().sum().backward()
        gradients.append((keys.grad, values.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_low_precision_training_path_is_close():
    queries, keys, values = qkv(4, 2, 6, 6, torch.float32)
    expected = naive_attention(queries, keys, values, causal=True)
    low = over(queries.bfloat16().requires_grad_(), keys.bfloat16(), values.bfloat16(), causal=True)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=0.05, rtol=0.05)


def test_causal_mask_lets_the_last_query_see_every_key():
    seen = CAUSAL.tensor(2, 4, torch.device("cpu"))
    assert seen is not None
    assert seen.tolist() == [[True, True, True, False], [True] * 4]


MASKS = {
    "causal": (CAUSAL, lambda q, k: k <= q),
    "bidirectional": (EVERYTHING, lambda q, k: True),
    "prefix": (Mask("prefix", 3), lambda q, k: k <= q or k < 3),
    "free": (Mask("free", visible=torch.rand(4, 5, 5) < 0.7), None),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("trains", [False, True])
def test_words_see_of_their_text_what_the_mask_lets_them_see(name: str, trains: bool):
    """Against scores of padded texts in which everything else is left out; text by text, for each way to compute it."""
    mask, rule = MASKS[name]
    real = torch.arange(5) < torch.tensor([5, 2, 4, 1])[:, None]
    layout = TextLayout.of(real.sum(dim=1))
    queries = torch.randn(int(real.sum()), 4, 6, dtype=torch.float64, requires_grad=trains)
    keys_values = torch.randn(int(real.sum()), 2, 2, 6, dtype=torch.float64, requires_grad=trains)
    if mask.visible is not None:
        mask.visible[:, torch.arange(5), torch.arange(5)] = True
    mixed = attend(queries, OwnWords(keys_values, layout), mask)
    start = 0
    for text, length in enumerate([5, 2, 4, 1]):
        own = slice(start, start + length)
        keys, values = keys_values[own].repeat_interleave(2, dim=2).permute(1, 2, 0, 3)
        scores = queries[own].transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(6)
        for q in range(length):
            for k in range(length):
                if not (rule(q, k) if rule is not None else bool(mask.visible[text, q, k])):  # pyright: ignore
                    scores[:, q, k] = -math.inf
        torch.testing.assert_close(mixed[own], (scores.softmax(-1) @ values).transpose(0, 1))
        start += length
    if trains:
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(mixed.sum(), (queries, keys_values)))


def test_rotary_keeps_lengths_and_scores_depend_on_distance_alone():
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    angles = rotary_angles(torch.arange(30), 8).double()
    queries, keys = rotate(query.expand(30, 8), angles), rotate(key.expand(30, 8), angles)
    torch.testing.assert_close(queries.norm(dim=1), query.norm().expand(30))
    scores = queries @ keys.T
    for distance in (-7, -1, 0, 3, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert scores[0].std() > 0.1
    torch.testing.assert_close(rotary_angles(torch.arange(5, 9), 8).double(), angles[5:9])


def block_config(kv_heads: int = 2, rotary: bool = False) -> BlockConfig:
    return BlockConfig(width=12, num_heads=4, num_kv_heads=kv_heads, head_dim=6, mlp_width=8, rotary=rotary)


def attention(rotary: bool = False, context_width: int | None = None) -> Attention:
    module = Attention(block_config(rotary=rotary), context_width).double()
    return module.requires_grad_(False)


def test_texts_of_one_image_see_it_alone():
    module = attention(context_width=5)
    images, x = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(6, 3, 12, dtype=torch.float64)
    layout = TextLayout.of(torch.tensor([3, 1, 2, 3, 0, 1]))
    packed = layout.pack(x)
    together = layout.pad(module(packed, SeenImages(*module.project_context(images), layout)))
    for row in range(6):
        length = [3, 1, 2, 3, 0, 1][row]
        alone = module(x[row : row + 1, :length], Padded(*module.project_context(images[row // 3 : row // 3 + 1])))
        torch.testing.assert_close(together[row, :length], alone[0])


def test_forward_over_itself_ignores_order():
    module, x = attention(), torch.randn(2, 5, 12, dtype=torch.float64)
    order = torch.randperm(5)
    torch.testing.assert_close(module(x)[:, order], module(x[:, order]))
    torch.testing.assert_close(module(x), module(x, Padded(*module.project_context(x))))
