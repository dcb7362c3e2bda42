"""Words that come a few at a time, with a cache, against all at once."""

import pytest
import torch
from torch import Tensor

from opencoca.generation.decoding.cache import WordCache
from opencoca.model.config import BlockConfig
from opencoca.model.kernels.choice import CAUSAL
from opencoca.model.layers.attention import Attention, CachedWords, NextWords
from opencoca.model.layers.layout import TextLayout

ROWS = 3


def block_config(rotary: bool = False) -> BlockConfig:
    return BlockConfig(width=12, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=20, rotary=rotary)


def next_words(rows: int, start: int, stop: int) -> NextWords:
    return NextWords(torch.arange(start, stop).repeat(rows), slice(start, stop), causal=True)


def step(attn: Attention, cache: WordCache, x: Tensor, start: int) -> Tensor:
    """x (B, T, D): the words from this position on -> (B, T, D)."""
    rows, length, _ = x.shape
    words = next_words(rows, start, start + length)
    return attn(x.flatten(0, 1), CachedWords(cache, words)).view(x.shape)


def at_once(attn: Attention, x: Tensor) -> Tensor:
    """x (B, T, D): all words, each with those before it -> (B, T, D)."""
    return attn(x.flatten(0, 1), TextLayout.of(torch.full(x.shape[:1], x.shape[1])), CAUSAL).view(x.shape)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("lengths", [[1] * 6, [6], [2, 1, 3], [4, 2]], ids=str)
@torch.inference_mode()
def test_steps_equal_the_whole(rotary: bool, lengths: list[int]):
    attn, x = Attention(block_config(rotary)).double(), torch.randn(ROWS, 6, 12, dtype=torch.float64)
    whole = at_once(attn, x)
    cache = WordCache.new(ROWS, block_config(), entries=7, like=x)
    parts, start = [], 0
    for length in lengths:
        parts.append(step(attn, cache, x[:, start : start + length], start))
        start += length
    # Angles are made in float32.
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-6 if rotary else 1e-12, rtol=0)


@torch.inference_mode()
def test_rows_can_be_dropped_reordered_and_repeated():
    attn, x = Attention(block_config()).double(), torch.randn(ROWS, 4, 12, dtype=torch.float64)
    cache = WordCache.new(ROWS, block_config(), entries=4, like=x)
    step(attn, cache, x[:, :3], 0)
    rows = torch.tensor([2, 0, 0, 2])
    cache.select(rows)
    last = step(attn, cache, x[rows, 3:], 3)
    whole = at_once(attn, x)
    torch.testing.assert_close(last, whole[rows, 3:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_half_precision_attends_in_float32(dtype):
    attn, x = Attention(block_config()).to(dtype), torch.randn(ROWS, 4, 12, dtype=dtype)
    cache = WordCache.new(ROWS, block_config(), entries=4, like=x)
    whole = at_once(attn, x)
    found = torch.cat([step(attn, cache, x[:, word : word + 1], word) for word in range(4)], dim=1)
    assert cache.memory.dtype == torch.float32
    assert torch.equal(cache.memory.to(dtype).float(), cache.memory)  # the keys themselves are as they were made
    assert found.dtype == dtype
    torch.testing.assert_close(found, whole, atol=2e-2, rtol=2e-2)
