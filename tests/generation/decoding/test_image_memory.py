"""What decoding keeps of images: the tokens with folded projections give what keys and values give."""

import pytest
import torch

from opencoca.generation.decoding.image_memory import ImageKeysValues
from opencoca.generation.decoding.session import DecodingSession, Room
from opencoca.generation.decoding.state import DecodingState
from opencoca.model import text_decoder
from opencoca.model.kernels.image_attention import FoldedImages

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
