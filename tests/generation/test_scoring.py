"""Scores of given texts against their definition: the log-softmax of all logits, summed over a text's words."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoca.generation import scoring
from opencoca.generation.scoring import TextScorer, label_scores, pointwise_mutual_information, prior_of_texts
from opencoca.model.coca import CoCa

NUM_IMAGES, NUM_TEXTS = 5, 7
TEXT_VARIANTS = {
    "learned": {},
    "rotary_tied": {"positions": "rotary", "tie_embeddings": True},
    "parallel": {"block": "parallel", "activation": "swiglu", "norm_bias": False},
    "one_kv_head": {"num_kv_heads": 1, "self_attn_mlp": True},
}


def make_texts(num_texts: int = NUM_TEXTS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random texts of 2 to 9 tokens, padded with an id that is a word too."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (num_texts,), generator=generator)
    lengths[0], lengths[-1] = 9, 2
    mask = torch.arange(9) < lengths[:, None]
    ids = torch.randint(0, 37, (num_texts, 9), generator=generator)
    return ids.where(mask, 0), mask


def definition(model: CoCa, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(I, B), one pair at a time, without padding."""
    scores = torch.zeros(len(images), len(ids), dtype=images.dtype)
    for image in range(len(images)):
        for text in range(len(ids)):
            words = ids[text][mask[text]][None]
            with torch.inference_mode():
                log_probs = model.logits(images[image : image + 1], words).log_softmax(dim=-1)
            scores[image, text] = log_probs[0, :-1].gather(1, words[0, 1:, None]).sum()
    return scores


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(NUM_IMAGES, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens_of(model: CoCa, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.encode_image(images).tokens


@pytest.mark.parametrize("text", TEXT_VARIANTS)
@pytest.mark.parametrize("pooler", [{}, {"num_queries": 0}, {"arrangement": "shared", "num_queries": 4}], ids=str)
def test_scores_are_the_sum_of_log_softmax(make_model, images, text, pooler):
    model = make_model(pooler=pooler, **TEXT_VARIANTS[text]).double()
    ids, mask = make_texts()
    expected = definition(model, images, ids, mask)
    assert float(expected.std(dim=0).min()) > 1e-3, "images must matter, or this test sees nothing"
    scorer = TextScorer(model, ids, mask)
    torch.testing.assert_close(scorer.score_all(tokens_of(model, images)), expected)
    assert scorer.lengths.tolist() == (mask.sum(dim=1) - 1).tolist()


@settings(max_examples=25)
@given(words=st.integers(1, 200), logits=st.integers(1, 2000), data=st.data())
def test_neither_chunks_nor_the_choice_change_a_score(make_model, words, logits, data):
    model = make_model().double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(NUM_IMAGES, 3, 12, 12, generator=generator, dtype=torch.float64)
    tokens = tokens_of(model, images)
    ids, mask = make_texts()
    whole = TextScorer(model, ids, mask).score_all(tokens)
    num_chosen = data.draw(st.integers(0, 9))
    row = st.lists(st.integers(0, NUM_TEXTS - 1), min_size=num_chosen, max_size=num_chosen)
    rows = data.draw(st.lists(row, min_size=NUM_IMAGES, max_size=NUM_IMAGES))
    chosen = torch.tensor(rows, dtype=torch.int64).view(NUM_IMAGES, num_chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_LOGITS_AT_A_TIME", logits)
        patch.setattr(scoring, "_TEXTS_AT_A_TIME", 3)
        found = TextScorer(model, ids, mask, words_at_a_time=words).score_chosen(tokens, chosen)
    torch.testing.assert_close(found, whole.gather(1, chosen))


def test_no_more_than_the_words_allowed_are_in_work(make_model, images, monkeypatch):
    """Neither words nor logits of more than the bound exist at once, and image keys are made once an image."""
    model = make_model().double()
    ids, mask = make_texts()
    tokens = tokens_of(model, images)
    words, rows, projected = [], [], []
    decoder, head = model.multimodal_decoder, model.lm_head
    forward, project = decoder.forward, decoder.project_image
    monkeypatch.setattr(decoder, "forward", lambda x, w, seen: words.append(len(x)) or forward(x, w, seen))
    monkeypatch.setattr(decoder, "project_image", lambda t: projected.append(len(t)) or project(t))
    head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    monkeypatch.setattr(scoring, "_LOGITS_AT_A_TIME", 5 * 37)
    TextScorer(model, ids, mask, words_at_a_time=20).score_all(tokens)
    assert max(words) <= 20
    assert max(rows) <= 5
    assert sum(words) == NUM_IMAGES * int((mask.sum(dim=1) - 1).sum())
    assert sum(projected) == NUM_IMAGES


def test_texts_pass_the_unimodal_half_once(make_model, images, monkeypatch):
    model = make_model().double()
    ids, mask = make_texts()
    scorer = TextScorer(model, ids, mask)
    monkeypatch.setattr(model.unimodal_decoder, "forward", lambda *args, **options: pytest.fail("called again"))
    scorer.score_all(tokens_of(model, images))


def test_the_probabilities_of_all_texts_sum_to_one(make_model, images):
    """Of all texts of one more word: start, any word."""
    model = make_model().double()
    ids = torch.stack((torch.full((37,), 5), torch.arange(37)), dim=1)
    scores = TextScorer(model, ids, torch.ones_like(ids, dtype=torch.bool)).score_all(tokens_of(model, images))
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(NUM_IMAGES, dtype=torch.float64))


def test_half_precision_gives_float32(make_model, images):
    model = make_model()
    ids, mask = make_texts()
    exact = TextScorer(model, ids, mask).score_all(tokens_of(model, images.float()))
    half = model.bfloat16()
    rounded = TextScorer(half, ids, mask).score_all(tokens_of(half, images.bfloat16()))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=1.0, rtol=0.05)


def test_the_prior_is_the_mean_probability(make_model, images):
    model = make_model().double()
    scorer = TextScorer(model, *make_texts())
    tokens = tokens_of(model, images)
    scores = scorer.score_all(tokens)
    prior = prior_of_texts(scorer, tokens)
    torch.testing.assert_close(prior.exp(), scores.exp().mean(dim=0))
    information = pointwise_mutual_information(scores, prior)
    # The mean ratio of p(text | image) to p(text) is 1 for every text.
    torch.testing.assert_close(information.exp().mean(dim=0), torch.ones(NUM_TEXTS, dtype=torch.float64))
    torch.testing.assert_close(pointwise_mutual_information(scores, prior, 0.25), scores - 0.25 * prior)


def test_a_label_has_the_mean_of_its_texts():
    scores = torch.tensor([[1.0, 3.0, 10.0, 20.0], [0.0, 2.0, 4.0, 6.0]])
    assert label_scores(scores, 2).tolist() == [[2.0, 15.0], [1.0, 5.0]]


def test_nothing_to_score(make_model, images):
    model = make_model().double()
    tokens = tokens_of(model, images)
    ids, mask = make_texts()
    assert TextScorer(model, ids[:0], mask[:0]).score_all(tokens).shape == (NUM_IMAGES, 0)
    assert TextScorer(model, ids, mask).score_all(tokens[:0]).shape == (0, NUM_TEXTS)


def test_mistakes(make_model):
    model = make_model()
    ids, mask = make_texts()
    with pytest.raises(ValueError, match="at least two tokens"):
        TextScorer(model, ids[:, :1], mask[:, :1])
    with pytest.raises(ValueError, match="at least two tokens"):
        TextScorer(model, ids, mask & (torch.arange(9) < 1))
    with pytest.raises(ValueError, match="padding before its end"):
        TextScorer(model, ids, mask & (torch.arange(9) != 3))
    with pytest.raises(ValueError, match="words_at_a_time is 0"):
        TextScorer(model, ids, mask, words_at_a_time=0)
    with pytest.raises(ValueError, match="training mode"):
        TextScorer(model.train(), ids, mask)
