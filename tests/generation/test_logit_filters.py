"""Logit filters against their definitions, and words that captions must or must not contain."""

import re

import pytest
import torch
from captioner import make_model, make_tokens
from hypothesis import given
from hypothesis import strategies as st

from opencoca.generation import GenerationOptions, generate
from opencoca.generation.logit_filters import (
    forbid_repeated_ngrams,
    make_filters,
    penalise_repetition,
    require_length,
    suppress,
)
from opencoca.generation.search import Limits
from opencoca.tokenizer import Tokenizer

VOCAB = 6
TEXTS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=7, max_size=7), min_size=1, max_size=4)


def log_probs_for(num_rows: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(num_rows, VOCAB, dtype=torch.float64).log_softmax(dim=1)


@given(TEXTS, st.integers(1, 8))
def test_no_ngram_twice(texts, n):
    log_probs = log_probs_for(len(texts))
    filtered = log_probs.clone()
    forbid_repeated_ngrams(filtered, torch.tensor(texts), n)
    for row, text in enumerate(texts):
        present = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        for token_id in range(VOCAB):
            forbidden = tuple([*text, token_id][-n:]) in present
            assert filtered[row, token_id] == (-torch.inf if forbidden else log_probs[row, token_id])


@given(TEXTS, st.floats(0.5, 3))
def test_repetition_penalty(texts, penalty):
    log_probs = log_probs_for(len(texts))
    filtered = log_probs.clone()
    penalise_repetition(filtered, torch.tensor(texts), penalty)
    for row, text in enumerate(texts):
        for token_id in range(VOCAB):
            factor = penalty if token_id in text else 1
            assert float(filtered[row, token_id]) == pytest.approx(float(log_probs[row, token_id]) * factor)


@pytest.mark.parametrize("length", [1, 6, 7, 8])
def test_minimum_length_and_suppressed_tokens(length):
    log_probs = log_probs_for(2)
    filtered = log_probs.clone()
    texts = torch.zeros(2, length, dtype=torch.int64)
    require_length(filtered, texts, 7, eos_id=4)
    suppress(filtered, texts, torch.tensor([1, 3]))
    forbidden = [1, 3, 4] if length < 7 else [1, 3]
    assert (filtered[:, forbidden] == -torch.inf).all()
    kept = [i for i in range(VOCAB) if i not in forbidden]
    torch.testing.assert_close(filtered[:, kept], log_probs[:, kept], rtol=0, atol=0)


SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "groups": {"num_beams": 4, "num_groups": 2, "diversity_penalty": 1.0},
    "samples": {"temperature": 1.0, "num_captions": 3},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("words", [("dog",), ("water", "brown dog"), ("climbs",)], ids=str)
def test_required_words_are_in_every_caption(tokenizer, search, words):
    model = make_model(tokenizer)
    options = GenerationOptions(required_words=words, **SEARCHES[search])
    for captions in generate(model, make_tokens(model, 6), tokenizer, options):
        for caption in captions:
            for word in words:
                assert re.search(rf"(?<!\w){word}(?!\w)", caption.text), caption.text


def likes(model, tokenizer: Tokenizer, text: str) -> None:
    """Makes the words of this text the most probable ones, whatever came before."""
    with torch.no_grad():
        model.multimodal_decoder.norm.bias.normal_()
        bias = model.multimodal_decoder.norm.bias
        for token_id in set(tokenizer.encode(text)[1:-1]):
            model.lm_head.weight[token_id] += 15 * bias / bias.norm() ** 2


@pytest.mark.parametrize("search", SEARCHES)
def test_forbidden_words_are_in_no_caption(tokenizer, search):
    model = make_model(tokenizer)
    likes(model, tokenizer, "dog grass water the")
    tokens = make_tokens(model, 6)
    free = generate(model, tokens, tokenizer, GenerationOptions(**SEARCHES[search]))
    texts = [caption.text for captions in free for caption in captions]
    words = [word for word in ("dog", "grass", "water", "the") if any(word in text for text in texts)]
    assert words, "the test says nothing if the model does not write these words by itself"
    options = GenerationOptions(forbidden_words=tuple(words), **SEARCHES[search])
    for captions in generate(model, tokens, tokenizer, options):
        for caption in captions:
            assert not set(words) & set(caption.text.split()), caption.text


def tokens_of_filter(tokenizer: Tokenizer, options: GenerationOptions, text: str) -> set[int]:
    """Which next tokens the filters forbid after a text, beyond those that are always forbidden."""
    ids, limits = torch.tensor([tokenizer.encode(text)[:-1]]), Limits(1, 30, tokenizer.eos_id)
    found = []
    for chosen in (GenerationOptions(), options):
        log_probs = torch.zeros(1, tokenizer.vocab_size)
        for one in make_filters(chosen, tokenizer, limits, tokenizer.vocab_size, "cpu"):
            one(log_probs, ids)
        found.append({i for i, value in enumerate(log_probs[0].tolist()) if value == -torch.inf})
    return found[1] - found[0]


def test_a_forbidden_word_is_forbidden_however_it_is_spelled():
    clip = Tokenizer.clip()
    options = GenerationOptions(forbidden_words=("cat", "Police car"))
    cat = clip.encode("cat")[1]
    assert tokens_of_filter(clip, options, "a photo of a") == {cat}
    # "police" may be written, "car" after it may not; elsewhere it may.
    car = clip.encode("car")[1]
    assert tokens_of_filter(clip, options, "a police") == {cat, car}
    spelled = torch.tensor([[clip.bos_id, 66]])  # "c", which does not end its word
    log_probs = torch.zeros(1, clip.vocab_size)
    filters = make_filters(options, clip, Limits(1, 30, clip.eos_id), clip.vocab_size, "cpu")
    for one in filters:
        one(log_probs, spelled)
    assert log_probs[0, clip.encode("at")[1]] == -torch.inf
    assert clip.decode([66, clip.encode("at")[1]]) == "cat"
    # "bobcat" is another word.
    log_probs = torch.zeros(1, clip.vocab_size)
    bob = next(i for i in range(49406) if clip.decode([i, cat]) == "bobcat")
    for one in filters:
        one(log_probs, torch.tensor([[clip.bos_id, bob]]))
    assert log_probs[0, cat] == 0


def test_words_of_the_clip_vocabulary_can_be_required(tokenizer):
    model = make_model(tokenizer, {"vocab_size": 49408, "context_length": 30})
    clip = Tokenizer.clip()
    options = GenerationOptions(required_words=("zebra", "fire truck"), max_new_tokens=12, num_beams=2)
    for (caption,) in generate(model, make_tokens(model, 3), clip, options):
        words = f" {caption.text} "
        assert " zebra " in words
        assert " fire truck " in words


def test_required_words_that_do_not_fit_are_refused(tokenizer):
    model = make_model(tokenizer)
    options = GenerationOptions(required_words=("brown dog",), max_new_tokens=2)
    with pytest.raises(ValueError, match="raise max_new_tokens or require fewer"):
        generate(model, make_tokens(model), tokenizer, options)
