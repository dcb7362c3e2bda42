"""The contrastive loss against loops written from its formula, and what it must not punish."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opencoca.distributed.world import World
from opencoca.losses import contrastive_loss


def naive_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor | float,
    image_ids: list[int],
    text_image_ids: list[int],
    reduction: str,
) -> Tensor:
    """Pair by pair: -log of the pair's share among itself and its true negatives, in either direction."""
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for i, image in enumerate(images):
        for t, text in enumerate(texts):
            if image_ids[i] != text_image_ids[t]:
                continue
            pairs += 1
            own = torch.exp(scale * (image @ text))
            other_texts = [texts[k] for k in range(len(texts)) if text_image_ids[k] != image_ids[i]]
            other_images = [images[k] for k in range(len(images)) if image_ids[k] != text_image_ids[t]]
            image_to_text = own / (own + sum(torch.exp(scale * (image @ other)) for other in other_texts))
            text_to_image = own / (own + sum(torch.exp(scale * (text @ other)) for other in other_images))
            total = total - torch.log(image_to_text) - torch.log(text_to_image)
    return total / pairs / (2 if reduction == "mean" else 1)


def embeddings(count: int, generator: torch.Generator | None = None) -> Tensor:
    return F.normalize(torch.randn(count, 6, dtype=torch.float64, generator=generator), dim=1)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Ids of the images of a batch, some of them there twice, and of the image that each text describes."""
    image_ids = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    text_image_ids = draw(st.lists(st.sampled_from(image_ids), min_size=1, max_size=8))
    return image_ids, text_image_ids


@given(batches(), st.floats(0.1, 20), st.sampled_from(["mean", "sum"]), st.integers(0, 99))
@settings(max_examples=80)
def test_value_and_gradients_equal_the_written_out_formula(ids, scale: float, reduction, seed: int):
    image_ids, text_image_ids = ids
    generator = torch.Generator().manual_seed(seed)
    arguments = [
        embeddings(len(image_ids), generator).requires_grad_(),
        embeddings(len(text_image_ids), generator).requires_grad_(),
        torch.tensor(scale, dtype=torch.float64, requires_grad=True),
    ]
    loss = contrastive_loss(*arguments, torch.tensor(image_ids), torch.tensor(text_image_ids), reduction=reduction)
    expected = naive_loss(*arguments, image_ids, text_image_ids, reduction)
    torch.testing.assert_close(loss, expected, atol=1e-7, rtol=1e-7)
    if len(set(image_ids)) == 1:
        # Without a negative there is nothing to learn.
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, arguments))
        return
    ours, theirs = torch.autograd.grad(loss, arguments), torch.autograd.grad(expected, arguments)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_text_an_image_is_clips_loss(reduction):
    images, texts = embeddings(5), embeddings(5)
    logits, labels = 14.0 * images @ texts.T, torch.arange(5)
    expected = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
    expected = expected / 2 if reduction == "mean" else expected
    torch.testing.assert_close(contrastive_loss(images, texts, 14.0, reduction=reduction), expected)


@given(st.integers(1, 4), st.integers(1, 4))
def test_by_default_texts_are_shared_out_in_order(images: int, texts_per_image: int):
    image_embed, text_embed = embeddings(images), embeddings(images * texts_per_image)
    ids = torch.arange(images)
    explicit = contrastive_loss(image_embed, text_embed, 5.0, ids, ids.repeat_interleave(texts_per_image))
    torch.testing.assert_close(contrastive_loss(image_embed, text_embed, 5.0), explicit)


def test_the_batchs_order_does_not_matter():
    images, texts = embeddings(4), embeddings(7)
    image_ids, text_image_ids = torch.tensor([3, 1, 4, 1]), torch.tensor([1, 1, 4, 3, 3, 1, 4])
    expected = contrastive_loss(images, texts, 9.0, image_ids, text_image_ids)
    for _ in range(5):
        i, t = torch.randperm(4), torch.randperm(7)
        torch.testing.assert_close(
            contrastive_loss(images[i], texts[t], 9.0, image_ids[i], text_image_ids[t]), expected
        )


def test_captions_of_one_image_and_copies_of_an_image_are_not_negatives():
    """A perfect model has no loss; were a sibling a negative, at least log 2 would remain."""
    directions = torch.eye(6, dtype=torch.float64)
    image_ids, text_image_ids = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 1, 2, 2])
    images, texts = directions[image_ids], directions[text_image_ids]
    assert contrastive_loss(images, texts, 100.0, image_ids, text_image_ids) < 1e-12
    # The same rows as different images are told apart at no scale.
    apart = contrastive_loss(images, texts, 100.0, torch.tensor([0, 1, 2, 3]), text_image_ids)
    assert apart > 0.99 * math.log(2) / 4


def test_an_uninformed_model_pays_the_logarithm_of_its_choices():
    same = torch.ones(4, 6, dtype=torch.float64) / 6**0.5
    assert contrastive_loss(same, same, 10.0).item() == pytest.approx(math.log(4))
    assert contrastive_loss(same, same, 10.0, reduction="sum").item() == pytest.approx(2 * math.log(4))


def test_an_image_without_text_is_a_negative_alone():
    images, texts = embeddings(3), embeddings(2)
    ids = torch.tensor([0, 1, 2])
    more = contrastive_loss(images, texts, 5.0, ids, ids[:2])
    assert more > contrastive_loss(images[:2], texts, 5.0, ids[:2], ids[:2])


def test_gradients_by_finite_differences():
    images, texts = embeddings(3).requires_grad_(), embeddings(5).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1, 0, 1])
    assert torch.autograd.gradcheck(lambda i, t, s: contrastive_loss(i, t, s, *ids), (images, texts, scale))


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_extreme_scales_stay_finite(scale: float):
    images, texts = embeddings(4).float().requires_grad_(), (-embeddings(4)).float().requires_grad_()
    loss = contrastive_loss(images, texts, scale)
    loss.backward()
    assert loss.isfinite()
    assert images.grad.isfinite().all()
    assert texts.grad.isfinite().all()


def test_float32_is_close_to_float64():
    images, texts = embeddings(32), embeddings(64)
    low = contrastive_loss(images.float(), texts.float(), 100.0)
    torch.testing.assert_close(low.double(), contrastive_loss(images, texts, 100.0), atol=1e-4, rtol=1e-4)


def test_autocast_is_close_to_full_precision():
    images, texts = embeddings(16).float(), embeddings(16).float()
    with torch.autocast("cpu", torch.bfloat16):
        low = contrastive_loss(images, texts, 14.0)
    torch.testing.assert_close(low.float(), contrastive_loss(images, texts, 14.0), atol=0.05, rtol=0.05)


def test_impossible_batches_are_errors():
    with pytest.raises(ValueError, match="5 texts cannot be shared out evenly among 3 images"):
        contrastive_loss(embeddings(3), embeddings(5), 1.0)
    with pytest.raises(ValueError, match="an image that is not in the batch"):
        contrastive_loss(embeddings(2), embeddings(2), 1.0, torch.tensor([0, 1]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="'median'"):
        contrastive_loss(embeddings(2), embeddings(2), 1.0, reduction="median")  # pyright: ignore[reportArgumentType]


@given(batches(), st.integers(1, 9), st.integers(0, 9))
@settings(max_examples=30)
def test_chunks_change_nothing(ids, chunk_rows: int, seed: int):
    image_ids, text_image_ids = torch.tensor(ids[0]), torch.tensor(ids[1])
    generator = torch.Generator().manual_seed(seed)
    images, texts = embeddings(len(image_ids), generator), embeddings(len(text_image_ids), generator)
    leaves = [images.requires_grad_(), texts.requires_grad_(), torch.tensor(7.0, dtype=torch.float64).requires_grad_()]
    whole = contrastive_loss(*leaves, image_ids, text_image_ids)
    chunked = contrastive_loss(*leaves, image_ids, text_image_ids, chunk_rows=chunk_rows)
    torch.testing.assert_close(chunked, whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(chunked, leaves), torch.autograd.grad(whole, leaves))


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that anything makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("chunk_rows", [1, 4, 16])
def test_similarities_exist_for_a_chunk_alone(chunk_rows: int):
    images, texts = embeddings(128).requires_grad_(), embeddings(128).requires_grad_()
    with LargestTensor() as largest:
        contrastive_loss(images, texts, 5.0, chunk_rows=chunk_rows).backward()
    assert largest.elements <= max(chunk_rows, 6) * 128 < 128 * 128


def test_processes_need_to_tell_their_images_apart():
    with pytest.raises(ValueError, match="image_ids are needed"):
        contrastive_loss(embeddings(2), embeddings(2), 1.0, world=World(0, 2))
