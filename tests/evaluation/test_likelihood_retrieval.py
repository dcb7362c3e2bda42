"""Reranked retrieval against the plain definition: a list for each query, its head sorted again, looked through."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cli_helpers import CAPTIONS, save_tiny_model, write_colours
from opencoca.data import ImageFolder
from opencoca.evaluation.likelihood_retrieval import less_prior, reranked_scores, score_shortlist, shortlist
from opencoca.evaluation.retrieval import evaluate_retrieval
from opencoca.evaluation.retrieval_metrics import retrieval_scores
from opencoca.inference.loading import load


def by_hand(cosines: torch.Tensor, scores: torch.Tensor, right: torch.Tensor, top: int) -> list[int]:
    """The rank of each query's best right answer; cosines, scores and right are (queries, answers)."""
    ranks = []
    for row in range(len(cosines)):
        order = cosines[row].argsort(descending=True).tolist()
        head = sorted(order[:top], key=lambda answer, row=row: -float(scores[row, answer]))
        ranked = head + order[top:]
        first = next(place for place, answer in enumerate(ranked) if right[row, answer])
        ranks.append(first + 1)  # others that are right come later, so that none stands before it
    return ranks


@given(st.integers(2, 9), st.integers(1, 4), st.integers(2, 12), st.integers(0, 2**31 - 1))
def test_ranks_equal_the_definition(num_images, per_image, top, seed):
    generator = torch.Generator().manual_seed(seed)
    image_embed = torch.nn.functional.normalize(torch.randn(num_images, 6, generator=generator), dim=1)
    num_texts = num_images * per_image
    text_embed = torch.nn.functional.normalize(torch.randn(num_texts, 6, generator=generator), dim=1)
    image_of_text = torch.arange(num_images).repeat(per_image)[torch.randperm(num_texts, generator=generator)]
    scores = torch.randn(num_images, num_texts, generator=generator)
    found = shortlist(image_embed, text_embed, top)
    cosines = image_embed @ text_embed.T
    torch.testing.assert_close(found.similarity, cosines[found.images, found.texts])
    result = reranked_scores(image_embed, text_embed, image_of_text, found, scores[found.images, found.texts])
    right = image_of_text[None] == torch.arange(num_images)[:, None]
    for ranks, name in (
        (by_hand(cosines, scores, right, top), "image_to_text"),
        (by_hand(cosines.T, scores.T, right.T, top), "text_to_image"),
    ):
        ranks = torch.tensor(ranks).double()
        for k in (1, 5, 10):
            assert getattr(result, f"{name}_r{k}") == pytest.approx(float((ranks <= k).double().mean()))
        assert getattr(result, f"{name}_median_rank") == float(ranks.quantile(0.5))


def test_scores_that_agree_with_the_cosine_change_nothing():
    image_embed = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    text_embed = torch.nn.functional.normalize(torch.randn(24, 4), dim=1)
    image_of_text = torch.arange(24) // 3
    found = shortlist(image_embed, text_embed, 5)
    assert reranked_scores(image_embed, text_embed, image_of_text, found, found.similarity) == retrieval_scores(
        image_embed, text_embed, image_of_text
    )


def test_ties_count_against_the_query():
    embed = torch.eye(3)
    found = shortlist(embed, embed, 3)
    scores = reranked_scores(embed, embed, torch.arange(3), found, torch.zeros(len(found.images)))
    assert (scores.image_to_text_r1, scores.image_to_text_median_rank, scores.text_to_image_r1) == (0, 3, 0)


def test_the_prior_is_the_mean_probability_over_a_texts_first_images():
    image_embed = torch.nn.functional.normalize(torch.randn(7, 4), dim=1)
    text_embed = torch.nn.functional.normalize(torch.randn(11, 4), dim=1)
    found = shortlist(image_embed, text_embed, 3)
    scores = -5 * torch.rand(len(found.images))
    informed = less_prior(found, scores)
    of_pair = {pair: place for place, pair in enumerate(zip(found.images.tolist(), found.texts.tolist(), strict=True))}
    for text in range(11):
        first = (image_embed @ text_embed[text]).topk(3).indices.tolist()
        mean = torch.stack([scores[of_pair[image, text]].exp() for image in first]).mean()
        for image in range(7):
            if (image, text) in of_pair:
                place = of_pair[image, text]
                torch.testing.assert_close(informed[place], scores[place] - mean.log())


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    pipeline = load(save_tiny_model(folder / "model"))
    captions = {f"{name}.png": tuple(own) for name, own in CAPTIONS.items()}
    return pipeline, ImageFolder(write_colours(folder / "images"), list(captions), captions)


@pytest.mark.parametrize("by", ["likelihood", "both"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_source_is_ranked_by_the_models_likelihood(setting, by, batch_size):
    pipeline, source = setting
    paths = [source.root / source.key(index) for index in range(len(source))]
    texts = [text for index in range(len(source)) for text in source.captions(index)]
    likelihood = pipeline.score_captions(paths, texts)
    cosines = pipeline.similarity(paths, texts)
    first = cosines.topk(2, dim=0).indices
    information = likelihood - likelihood.gather(0, first).logsumexp(dim=0) + torch.tensor(2.0).log()
    scores = information + (pipeline.model.logit_scale.item() * cosines if by == "both" else 0)
    found = shortlist(pipeline.embed_images(paths), pipeline.embed_texts(texts), 2)
    expected = reranked_scores(
        pipeline.embed_images(paths),
        pipeline.embed_texts(texts),
        torch.arange(8) // 2,
        found,
        scores[found.images, found.texts],
    )
    assert evaluate_retrieval(pipeline, source, by=by, rerank_top=2, batch_size=batch_size).scores == expected


def test_mistakes(setting):
    pipeline, source = setting
    with pytest.raises(ValueError, match="cannot rank by 'taste'"):
        evaluate_retrieval(pipeline, source, by="taste")  # pyright: ignore
    with pytest.raises(ValueError, match="rerank_top is 1"):
        evaluate_retrieval(pipeline, source, by="both", rerank_top=1)
    found = shortlist(torch.eye(3), torch.eye(3), 2)
    with pytest.raises(ValueError, match="3 images could be read at first, but now 0"):
        score_shortlist(pipeline.text_scorer(["a", "b", "c"]), [], found)
