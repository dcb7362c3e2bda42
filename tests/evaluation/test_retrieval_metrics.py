"""Recalls equal a plain float64 ranking, ties count against the query, and no order or chunk size matters."""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opencoca.evaluation.retrieval_metrics import retrieval_scores


def reference_scores(image_embed, text_embed, image_of_text):
    """The protocol spelled out, one query at a time, in exact integer or float64 arithmetic."""
    images, texts = (np.asarray(embed, dtype=np.float64) for embed in (image_embed, text_embed))
    image_ranks, text_ranks = [], []
    for image in range(len(images)):
        scores = [float(images[image] @ text) for text in texts]
        own = [text for text in range(len(texts)) if image_of_text[text] == image]
        best = max(scores[text] for text in own)
        image_ranks.append(1 + sum(scores[text] >= best for text in range(len(texts)) if text not in own))
    for text in range(len(texts)):
        scores = [float(image @ texts[text]) for image in images]
        own = int(image_of_text[text])
        text_ranks.append(1 + sum(scores[image] >= scores[own] for image in range(len(images)) if image != own))
    recalls = [float(np.mean([rank <= k for rank in ranks])) for ranks in (image_ranks, text_ranks) for k in (1, 5, 10)]
    return (*recalls, float(np.median(image_ranks)), float(np.median(text_ranks)), len(images), len(texts))


@st.composite
def cases(draw):
    """Small integer embeddings, so that ties are frequent and exact; at least one text an image, in any order."""
    num_images = draw(st.integers(1, 14))
    extra = draw(st.lists(st.integers(0, num_images - 1), max_size=20))
    image_of_text = draw(st.permutations([*range(num_images), *extra]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    high = draw(st.sampled_from([1, 2, 3, 100]))
    images = torch.randint(0, high, (num_images, 3), generator=generator).float()
    texts = torch.randint(0, high, (len(image_of_text), 3), generator=generator).float()
    return images, texts, torch.tensor(image_of_text)


@given(cases(), st.sampled_from([1, 200, 1 << 28]))
def test_scores_equal_the_reference(case, chunk_bytes):
    assert astuple(retrieval_scores(*case, chunk_bytes=chunk_bytes)) == pytest.approx(reference_scores(*case))


def random_case(num_images=60, num_texts=200, dtype=torch.float32):
    images = torch.nn.functional.normalize(torch.randn(num_images, 16), dim=1)
    owner = torch.cat([torch.arange(num_images), torch.randint(num_images, (num_texts - num_images,))])
    texts = torch.nn.functional.normalize(images[owner] + 0.5 * torch.randn(num_texts, 16), dim=1)
    return images.to(dtype), texts.to(dtype), owner


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_real_embeddings_equal_the_reference(dtype):
    images, texts, owner = random_case(dtype=dtype)
    assert astuple(retrieval_scores(images, texts, owner)) == pytest.approx(
        reference_scores(images.double(), texts.double(), owner)
    )


def test_the_order_of_rows_does_not_matter():
    images, texts, owner = random_case()
    texts[::3] = texts[0]  # many ties, which rounding must not break
    scores = retrieval_scores(images, texts, owner)
    assert 0 < scores.text_to_image_r1 < 1
    for _ in range(5):
        image_order, text_order = torch.randperm(len(images)), torch.randperm(len(texts))
        new_row = torch.empty_like(image_order)
        new_row[image_order] = torch.arange(len(images))
        shuffled = retrieval_scores(
            images[image_order], texts[text_order], new_row[owner[text_order]], chunk_bytes=9999
        )
        assert shuffled == scores


@pytest.mark.parametrize("width", [1, 3, 512])
def test_equal_embeddings_find_nothing(width):
    embed = torch.nn.functional.normalize(torch.rand(1, width), dim=1)
    owner = torch.arange(40).repeat_interleave(5)
    scores = retrieval_scores(embed.expand(40, -1), embed.expand(200, -1), owner, chunk_bytes=200 * 16 * 7)
    assert astuple(scores)[:6] == (0,) * 6
    assert (scores.image_to_text_median_rank, scores.text_to_image_median_rank) == (196, 40)


def test_own_captions_do_not_stand_in_the_way_of_each_other():
    embed = torch.eye(3)
    scores = retrieval_scores(embed, embed.repeat_interleave(5, dim=0), torch.arange(3).repeat_interleave(5))
    assert astuple(scores) == (1, 1, 1, 1, 1, 1, 1, 1, 3, 15)


def test_the_chunks_keep_to_their_bound(monkeypatch):
    largest = 0
    matmul = torch.Tensor.__matmul__

    def watched(self, other):
        nonlocal largest
        product = matmul(self, other)
        largest = max(largest, product.numel() * product.element_size())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    images, texts, owner = random_case(300, 900)
    bounded = retrieval_scores(images, texts, owner, chunk_bytes=100_000)
    assert 0 < largest <= 100_000
    assert bounded == retrieval_scores(images, texts, owner)
    assert largest == 300 * 900 * 8


def test_inputs_are_left_alone():
    images, texts, owner = random_case(dtype=torch.float64)
    before = images.clone(), texts.clone(), owner.clone()
    retrieval_scores(images, texts, owner)
    assert all(torch.equal(old, new) for old, new in zip(before, (images, texts, owner), strict=True))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_scores():
    case = random_case(200, 1000)
    assert retrieval_scores(*(tensor.cuda() for tensor in case)) == retrieval_scores(*case)


EYE = torch.eye(2)


@pytest.mark.parametrize(
    ("images", "texts", "owner", "message"),
    [
        (EYE, torch.eye(3), torch.tensor([0, 1, 1]), r"\(2, 2\).*\(3, 3\)"),
        (EYE[0], EYE, torch.tensor([0, 1]), "two matrices"),
        (EYE[:0], EYE[:0], torch.tensor([], dtype=torch.long), "at least one"),
        (EYE, EYE, torch.tensor([0]), "one integer for each of the 2 texts"),
        (EYE, EYE, torch.tensor([0.0, 1.0]), "one integer for each"),
        (EYE, EYE, torch.tensor([0, 2]), "Text 1 belongs to image 2 of 2"),
        (EYE, EYE, torch.tensor([0, -1]), "Text 1 belongs to image -1"),
        (EYE, EYE, torch.tensor([0, 0]), "Image 1 has no text"),
        (EYE * torch.tensor([1, torch.nan]), EYE, torch.tensor([0, 1]), "Row 0 of image_embed is not finite"),
        (EYE, torch.tensor([[1, 0], [torch.inf, 0]]), torch.tensor([0, 1]), "Row 1 of text_embed is not finite"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(images, texts, owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval_scores(images, texts, owner)
