"""What decoding keeps of images: the tokens with folded projections give what keys and values give."""

import pytest
import torch

from opencoca.generation.decoding import image_memory
from opencoca.generation.decoding.image_memory import FoldedImages
from opencoca.generation.decoding.state import decode_step, start_decoding

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
    monkeypatch.setattr(image_memory, "pays", lambda *_: True)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_keys_and_values(make_model, always_folds: None, kind: str) -> None:
    """Prompt of three words, words one by one, images that leave, two texts an image."""
    model = make_model(**KINDS[kind]).double()
    images = torch.randn(3, 3, *model.config.image.image_size, dtype=torch.float64)
    ids = torch.randint(3, 30, (6, 6))
    with torch.inference_mode():
        tokens = model.encode_image(images).tokens
        states = [start_decoding(model, tokens, 2, words_per_image=words) for words in (None, 1)]
        assert isinstance(states[0].images[0], tuple)
        assert all(isinstance(memory, FoldedImages) for memory in states[1].images)
        for start, end in ((0, 3), (3, 4), (4, 5)):
            expected, found = (decode_step(model, ids[:, start:end], state) for state in states)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for state in states:
            state.select(torch.tensor([4, 5, 0, 1]), torch.tensor([2, 0]))
        expected, found = (decode_step(model, ids[[4, 5, 0, 1], 5:], state) for state in states)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_all_layers_read_the_same_tokens(make_model, always_folds: None) -> None:
    model = make_model(multimodal_depth=3)
    with torch.inference_mode():
        tokens = model.encode_image(torch.randn(4, 3, *model.config.image.image_size)).tokens
        state = start_decoding(model, tokens, words_per_image=5)
        state.select(torch.tensor([1, 3]), torch.tensor([1, 3]))
    first, *others = [memory.tokens for memory in state.images]
    assert first.shape[0] == 2
    assert all(other is first for other in others)


def test_few_words_of_many_tokens_fold(make_model) -> None:
    model = make_model(image={"image_size": (96, 96), "patch_size": 4}, pooler={"num_queries": 0}, num_heads=2)
    tokens = model.encode_image(torch.randn(1, 3, 96, 96)).tokens
    assert tokens.shape[1] > 500

    def kinds(words: int | None, tokens: torch.Tensor = tokens) -> set[type]:
        with torch.no_grad():
            return set(map(type, start_decoding(model, tokens, words_per_image=words).images))

    assert kinds(2) == {FoldedImages}
    assert kinds(None) == kinds(500) == {tuple}
    with torch.autocast("cpu"):
        assert kinds(2) == {tuple}
    model.to("meta")
    assert kinds(2, tokens.to("meta")) == {tuple}  # on another device it is not measured, and not used
