"""Cached, compacted generation against the plain definition: the whole text through the whole model for each token."""

import itertools
import weakref

import pytest
import torch
from captioner import (
    CONTEXT_LENGTH,
    NUM_IMAGES,
    best_of,
    forbidden_ids,
    make_model,
    make_tokens,
    next_log_probs,
    teacher_forced,
)

from opencoca.generation import GenerationOptions, generate
from opencoca.generation.decoding.session import DecodingSession
from opencoca.generation.decoding.state import DecodingState
from opencoca.model import text_decoder
from opencoca.model.coca import CoCa
from opencoca.tokenizer import Tokenizer

TEXT_VARIANTS = {
    "learned": {},
    "rotary": {"positions": "rotary"},
    "parallel": {"block": "parallel", "activation": "swiglu", "norm_bias": False},
    "one_kv_head": {"num_kv_heads": 1},
    "tied_rotary_grouped": {"positions": "rotary", "num_kv_heads": 2, "tie_embeddings": True},
    "two_mlps": {"self_attn_mlp": True, "head_dim": 6},
}
POOLER_VARIANTS = {
    "cascade": {"num_queries": 5},
    "no_queries": {"num_queries": 0},
    "shared": {"arrangement": "shared", "num_queries": 4},
    "parallel_poolers": {"arrangement": "parallel", "num_queries": 3},
}


def generate_slowly(
    model: CoCa, image_tokens: torch.Tensor, tokenizer: Tokenizer, options: GenerationOptions
) -> list[tuple[int, ...]]:
    """Token ids of each image's caption, without a cache, without a batch."""
    captions = []
    prompt = [tokenizer.bos_id, *tokenizer.encode(options.prefix)[1:-1]]
    for tokens in image_tokens:
        ids = list(prompt)
        while ids[-1] != tokenizer.eos_id and len(ids) < CONTEXT_LENGTH:
            num_new = len(ids) - len(prompt)
            if num_new == options.max_new_tokens:
                break
            order = next_log_probs(model, ids, tokens).argsort(descending=True).tolist()
            forbidden = forbidden_ids(model, tokenizer)
            if num_new < options.min_new_tokens:
                forbidden.add(tokenizer.eos_id)
            ids.append(next(token_id for token_id in order if token_id not in forbidden))
        captions.append(tuple(ids))
    return captions


# By default every text model with the first pooler, and every pooler with the first text model.
PAIRS = [
    pytest.param(text, pooler, marks=() if text == "learned" or pooler == "cascade" else pytest.mark.slow)
    for text, pooler in itertools.product(TEXT_VARIANTS, POOLER_VARIANTS)
]


@pytest.mark.parametrize(("text", "pooler"), PAIRS)
def test_ids_equal_uncached_decoding(tokenizer, text, pooler):
    model = make_model(tokenizer, TEXT_VARIANTS[text], POOLER_VARIANTS[pooler])
    tokens = make_tokens(model)
    options = GenerationOptions()
    captions = best_of(generate(model, tokens, tokenizer, options))
    assert [caption.token_ids for caption in captions] == generate_slowly(model, tokens, tokenizer, options)
    for caption, image_tokens in zip(captions, tokens, strict=True):
        assert caption.log_probability == pytest.approx(teacher_forced(model, image_tokens, caption), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(max_new_tokens=1),
        GenerationOptions(max_new_tokens=4),
        GenerationOptions(max_new_tokens=9, min_new_tokens=6),
        GenerationOptions(max_new_tokens=9, min_new_tokens=9),
        GenerationOptions(prefix="a brown dog"),
        GenerationOptions(max_new_tokens=5, min_new_tokens=2, prefix="two"),
    ],
    ids=str,
)
def test_options_equal_uncached_decoding(tokenizer, options):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    captions = best_of(generate(model, tokens, tokenizer, options))
    assert [caption.token_ids for caption in captions] == generate_slowly(model, tokens, tokenizer, options)
    for caption, image_tokens in zip(captions, tokens, strict=True):
        num_words = caption.length - (caption.token_ids[-1] == tokenizer.eos_id)
        assert options.min_new_tokens <= num_words <= options.max_new_tokens
        assert caption.text.startswith(options.prefix)
        assert caption.log_probability == pytest.approx(teacher_forced(model, image_tokens, caption), abs=1e-4)


def test_the_test_model_ends_captions_at_different_lengths(tokenizer):
    """Without this the tests here would not see texts leave the batch."""
    model = make_model(tokenizer)
    captions = best_of(generate(model, make_tokens(model), tokenizer))
    assert len({caption.length for caption in captions}) >= 4
    assert len({caption.token_ids for caption in captions}) >= 8
    assert any(caption.token_ids[-1] != tokenizer.eos_id for caption in captions)


def test_a_caption_does_not_depend_on_its_batch(tokenizer):
    model = make_model(tokenizer, {"positions": "rotary"})
    tokens = make_tokens(model)
    together = best_of(generate(model, tokens, tokenizer))
    generator = torch.Generator().manual_seed(2)
    for size in (1, 2, 5, NUM_IMAGES):
        chosen = torch.randperm(NUM_IMAGES, generator=generator)[:size]
        for index, caption in zip(chosen.tolist(), best_of(generate(model, tokens[chosen], tokenizer)), strict=True):
            assert caption.token_ids == together[index].token_ids
            assert caption.text == together[index].text
            assert caption.log_probability == pytest.approx(together[index].log_probability, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_when_texts_are_dropped_changes_nothing(tokenizer, monkeypatch, share):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    usual = best_of(generate(model, tokens, tokenizer))
    monkeypatch.setattr("opencoca.generation.loop._DROP_FROM_SHARE", share)
    again = best_of(generate(model, tokens, tokenizer))
    assert [caption.token_ids for caption in again] == [caption.token_ids for caption in usual]


@pytest.mark.parametrize("at_a_time", [1, 5, 12])
def test_large_batches_in_parts_are_the_same(tokenizer, monkeypatch, at_a_time):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    for options in (GenerationOptions(temperature=1.5), GenerationOptions(num_beams=2, num_captions=2)):
        whole = generate(model, tokens, tokenizer, options)
        with monkeypatch.context() as patch:
            patch.setattr("opencoca.generation.loop._TEXTS_AT_A_TIME_ON_CPU", at_a_time)
            parts = generate(model, tokens, tokenizer, options)
        assert [[c.token_ids for c in found] for found in parts] == [[c.token_ids for c in found] for found in whole]


def test_a_part_is_forgotten_before_the_next_one_starts(tokenizer, monkeypatch):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    states: list[weakref.ref[DecodingState]] = []
    alive = []
    start = DecodingSession._start

    def start_and_count(*args, **kwargs):
        alive.append(sum(state() is not None for state in states))
        state = start(*args, **kwargs)
        states.append(weakref.ref(state))
        return state

    monkeypatch.setattr(DecodingSession, "_start", start_and_count)
    monkeypatch.setattr("opencoca.generation.loop._TEXTS_AT_A_TIME_ON_CPU", 4)
    generate(model, tokens, tokenizer, GenerationOptions(num_beams=2))
    assert len(alive) > 1
    assert set(alive) == {0}


def test_finished_texts_are_not_computed_on(tokenizer, monkeypatch):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    monkeypatch.setattr("opencoca.generation.loop._DROP_FROM_SHARE", 0.0)
    rows = []
    step = DecodingSession.step
    monkeypatch.setattr(DecodingSession, "step", lambda *args: rows.append(len(args[1])) or step(*args))
    captions = best_of(generate(model, tokens, tokenizer))
    assert sum(rows) == sum(caption.length for caption in captions)


def test_captions_fit_the_context_and_decode(tokenizer):
    model = make_model(tokenizer)
    for (caption,) in generate(model, make_tokens(model), tokenizer, GenerationOptions(max_new_tokens=1000)):
        assert len(caption.token_ids) <= CONTEXT_LENGTH
        assert caption.token_ids[0] == tokenizer.bos_id
        assert tokenizer.pad_id not in caption.token_ids
        assert caption.token_ids.count(tokenizer.bos_id) == 1
        assert tokenizer.eos_id not in caption.token_ids[:-1]
        assert caption.text == tokenizer.decode(caption.token_ids)


def test_no_images_give_no_captions(tokenizer):
    model = make_model(tokenizer)
    assert generate(model, make_tokens(model)[:0], tokenizer) == []


def test_training_mode_is_refused(tokenizer):
    model = make_model(tokenizer)
    with pytest.raises(ValueError, match="training mode"):
        generate(model.train(), make_tokens(model), tokenizer)


def test_a_session_of_another_model_is_refused(tokenizer):
    model = make_model(tokenizer)
    with pytest.raises(ValueError, match="another model"):
        generate(model, make_tokens(model), tokenizer, session=DecodingSession(make_model(tokenizer)))


def test_a_prefix_without_room_is_refused(tokenizer):
    model = make_model(tokenizer)
    with pytest.raises(ValueError, match="prefix"):
        generate(model, make_tokens(model), tokenizer, GenerationOptions(prefix="qzx" * 10))


@pytest.mark.parametrize("counts", [(0, 0), (5, 6), (5, -1)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="new_tokens"):
        GenerationOptions(*counts)


@pytest.mark.parametrize(
    ("options", "words"), [({}, 8), ({"num_beams": 3}, 24), ({"num_captions": 2, "temperature": 1.0}, 16)]
)
def test_looking_at_the_images_tokens_changes_no_caption(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, options: dict, words: int
) -> None:
    """Where few words will come; how many is known before the first: of every text, the start token and seven more."""
    model = make_model(tokenizer)
    tokens, options = make_tokens(model), GenerationOptions(max_new_tokens=7, **options)
    expected = generate(model, tokens, tokenizer, options)
    asked: list[float] = []

    def counted(words_per_image: float, *_: object) -> bool:
        asked.append(words_per_image)
        return True

    monkeypatch.setattr(text_decoder, "projects_words", counted)
    found = generate(model, tokens, tokenizer, options)
    assert set(asked) == {words}
    ids = [[[text.token_ids for text in texts] for texts in captions] for captions in (expected, found)]
    assert ids[0] == ids[1]
