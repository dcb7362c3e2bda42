"""What decoding keeps: words that come a few at a time against all at once, folded images against keys and values."""

import pytest
import torch
from torch import Tensor

from opencoca.generation.decoding.session import DecodingSession, Room
from opencoca.generation.decoding.state import DecodingState, ImageKeysValues, WordCache
from opencoca.model import text_decoder
from opencoca.model.config import BlockConfig
from opencoca.model.kernels.choice import CAUSAL
from opencoca.model.kernels.image_attention import FoldedImages
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


KINDS = {
    "plain": {},
    "grouped heads": {"num_heads": 4, "num_kv_heads": 2},
    "one key-value head, parallel blocks, rotary": {
        "num_heads": 4,
        "num_kv_heads": 1,
        "block": "parallel",
        "positions": "rotary",
    },
    "a norm of the image's tokens": {"norm_image_tokens": True},
    "a norm without shift, no biases": {"norm_image_tokens": True, "norm_bias": False, "linear_bias": False},
}


@pytest.fixture
def always_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_decoder, "projects_words", lambda *_: True)


def started(session: DecodingSession, tokens: torch.Tensor, texts: int = 1) -> DecodingState:
    """A state with so many texts of each image."""
    state = session.start(tokens)
    state.select(torch.arange(len(tokens)).repeat_interleave(texts))
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_keys_and_values(make_model, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Prompt of three words, words one by one, images that leave, two texts an image."""
    model = make_model(**KINDS[kind]).double()
    images = torch.randn(3, 3, *model.config.image.image_size, dtype=torch.float64)
    ids = torch.randint(3, 30, (6, 6))
    with torch.inference_mode():
        tokens = model.encode_image(images).tokens
        session, states = DecodingSession(model), []
        for folds in (False, True):
            monkeypatch.setattr(text_decoder, "projects_words", lambda *_, folds=folds: folds)
            states.append(started(session, tokens, 2))
        assert all(isinstance(memory, ImageKeysValues) for memory in states[0].images)
        assert all(isinstance(memory, FoldedImages) for memory in states[1].images)
        for start, end in ((0, 3), (3, 4), (4, 5)):
            expected, found = (session.step(ids[:, start:end], state) for state in states)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for state in states:
            state.select(torch.tensor([4, 5, 0, 1]), torch.tensor([2, 0]))
        expected, found = (session.step(ids[[4, 5, 0, 1], 5:], state) for state in states)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_all_layers_read_the_same_tokens(make_model, always_folds: None) -> None:
    model = make_model(multimodal_depth=3)
    with torch.inference_mode():
        tokens = model.encode_image(torch.randn(4, 3, *model.config.image.image_size)).tokens
        state = DecodingSession(model).start(tokens)
        state.select(torch.tensor([1, 3]), torch.tensor([1, 3]))
    first, *others = [memory.tokens for memory in state.images]
    assert first.shape[0] == 2
    assert all(other is first for other in others)


def test_few_words_of_many_tokens_fold(make_model) -> None:
    model = make_model(image={"image_size": (96, 96), "patch_size": 4}, pooler={"num_queries": 0}, num_heads=2)
    tokens = model.encode_image(torch.randn(1, 3, 96, 96)).tokens
    assert tokens.shape[1] > 500

    def kinds(texts: int, tokens: torch.Tensor = tokens) -> set[type]:
        with torch.no_grad():
            return set(map(type, DecodingSession(model).start(tokens, Room(length=2, texts=texts)).images))

    assert kinds(1) == {FoldedImages}
    assert kinds(250) == {ImageKeysValues}
    with torch.autocast("cpu"):
        assert kinds(1) == {ImageKeysValues}
    model.to("meta")
    assert kinds(1, tokens.to("meta")) == {ImageKeysValues}  # on another device it is not measured, and not used
