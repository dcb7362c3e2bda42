"""Reranking: the mix of both halves' opinions over all candidates, with the similarity of the embeddings."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opencoca.generation import GeneratedCaption, GenerationOptions, generate
from opencoca.generation.rerank import (
    DEFAULT_RERANK_WEIGHT,
    MIN_SAMPLES,
    candidate_options,
    generate_reranked,
    mixed_scores,
    rerank,
    rerank_weight,
)
from opencoca.tokenizer import Tokenizer, train_tokenizer

CAPTIONS = ["a brown dog runs over the grass", "two children play in the water", "a man in a red shirt climbs a rock"]
NUM_IMAGES = 5
SEARCHES = {
    "beams": GenerationOptions(num_beams=5, max_new_tokens=9),
    "three_of_beams": GenerationOptions(num_beams=5, num_captions=3, max_new_tokens=9),
    "samples": GenerationOptions(temperature=1.0, max_new_tokens=9),
    "many_samples": GenerationOptions(top_k=20, num_captions=MIN_SAMPLES + 3, max_new_tokens=9),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS * 3, 290)


@pytest.fixture
def model(make_model, tokenizer):
    model = make_model(vocab_size=tokenizer.vocab_size, context_length=14)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    return model


@pytest.fixture
def images(model):
    with torch.inference_mode():
        return model.encode_image(torch.randn(NUM_IMAGES, 3, 12, 12))


def caption(text: str, log_probability: float, length: int, embed: list[float] | None) -> GeneratedCaption:
    vector = None if embed is None else torch.tensor(embed)
    return GeneratedCaption(text, (1, 5, 2), log_probability, length, text_embed=vector)


def test_the_weight_shifts_the_order_from_probable_to_similar():
    likely = caption("likely", -2.0, 4, [0.0, 1.0])
    similar = caption("similar", -9.0, 3, [1.0, 0.0])
    embed = torch.tensor([0.8, 0.6])
    first = {weight: rerank([likely, similar], embed, 10.0, weight)[0].text for weight in (0.0, 0.25, 0.75, 1.0)}
    # Mean log-probabilities -0.5 and -3; similarities 0.6 and 0.8: the order changes where 2.5 (1 - w) = 2 w.
    assert first == {0.0: "likely", 0.25: "likely", 0.75: "similar", 1.0: "similar"}
    best = rerank([likely, similar], embed, 10.0, 0.25)[0]
    assert best.score == pytest.approx(0.75 * -0.5 + 0.25 * 10 * 0.6)
    assert best.similarity == pytest.approx(0.6)
    assert (best.log_probability, best.length, best.token_ids) == (-2.0, 4, (1, 5, 2))


@given(
    st.lists(st.tuples(st.floats(-40, 0), st.integers(1, 20), st.floats(-1, 1)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_scores_fall_and_equals_keep_their_order(values, weight):
    candidates = [caption(str(place), p, length, [cosine, 0.0]) for place, (p, length, cosine) in enumerate(values)]
    ranked = rerank(candidates, torch.tensor([1.0, 0.0]), 20.0, weight)
    assert sorted(int(c.text) for c in ranked) == list(range(len(values)))
    for better, worse in itertools.pairwise(ranked):
        assert (-better.score, int(better.text)) <= (-worse.score, int(worse.text))


def test_mean_log_probability_and_scaled_cosine_are_mixed():
    found = mixed_scores(torch.tensor([-6.0, -4.0]), torch.tensor([3, 2]), torch.tensor([0.5, -0.5]), 8.0, 0.25)
    torch.testing.assert_close(found, torch.tensor([0.75 * -2 + 0.25 * 4, 0.75 * -2 - 0.25 * 4]))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_generated_candidates_are_ranked_by_both_halves(model, tokenizer, images, search, weight):
    """Against scores from a second, separate pass of the words through the text encoder."""
    options = SEARCHES[search]
    seeds = list(range(7, 7 + NUM_IMAGES))
    found = generate_reranked(model, images, tokenizer, options, weight, image_seeds=seeds)
    every = generate(model, images.tokens, tokenizer, candidate_options(options), image_seeds=seeds)
    changed = 0
    for own, candidates, embed in zip(found, every, images.embed, strict=True):
        assert len(own) == options.num_captions
        expected = []
        for candidate in candidates:
            ids = candidate.token_ids
            ids = ids if ids[-1] == tokenizer.eos_id else (*ids, tokenizer.eos_id)
            if len(ids) > 14:
                ids = (*ids[:13], tokenizer.eos_id)
            with torch.inference_mode():
                cosine = float(model.encode_text(torch.tensor([ids])).embed[0] @ embed)
            mean = candidate.log_probability / candidate.length
            expected.append((1 - weight) * mean + weight * model.logit_scale.item() * cosine)
        best = sorted(expected, reverse=True)[: options.num_captions]
        assert [c.score for c in own] == pytest.approx(best, abs=1e-4)
        assert {c.token_ids for c in own} <= {c.token_ids for c in candidates}
        changed += own[0].token_ids != candidates[0].token_ids
    if weight == 1.0:
        assert changed, "the similarity must matter here, or this test sees nothing"


def test_an_images_captions_do_not_depend_on_its_batch(model, tokenizer, images):
    options = GenerationOptions(temperature=1.0, max_new_tokens=9)
    together = generate_reranked(model, images, tokenizer, options, 0.5, image_seeds=range(NUM_IMAGES))
    for place in range(NUM_IMAGES):
        alone = type(images)(images.tokens[place : place + 1], images.embed[place : place + 1])
        (found,) = generate_reranked(model, alone, tokenizer, options, 0.5, image_seeds=[place])
        assert [c.token_ids for c in found] == [c.token_ids for c in together[place]]


def test_how_many_candidates_there_are():
    assert candidate_options(SEARCHES["three_of_beams"]).num_captions == 5
    assert candidate_options(SEARCHES["samples"]).num_captions == MIN_SAMPLES
    assert candidate_options(SEARCHES["many_samples"]).num_captions == MIN_SAMPLES + 3
    with pytest.raises(ValueError, match="leaves nothing to rerank"):
        candidate_options(GenerationOptions())


def test_weights():
    assert rerank_weight(False) is None
    assert rerank_weight(True) == DEFAULT_RERANK_WEIGHT
    assert rerank_weight(0) == 0.0
    assert rerank_weight(0.7) == 0.7
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="choose 0"):
            rerank_weight(wrong)


def test_candidates_without_embeddings_are_refused():
    with pytest.raises(ValueError, match="text_embed"):
        rerank([caption("a", -1.0, 1, None)], torch.tensor([1.0]), 1.0, 0.5)
    assert rerank([], torch.tensor([1.0]), 1.0, 0.5) == ()
