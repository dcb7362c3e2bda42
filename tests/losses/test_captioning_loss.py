"""The captioning loss against loops in float64, its own gradients, and what it keeps in memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opencoca.losses import captioning_loss


def naive_loss(hidden: Tensor, next_ids: list[int], head: Tensor, smoothing: float, reduction: str) -> Tensor:
    """Word by word and entry by entry: the cross-entropy of a target that is smoothed over the vocabulary."""
    total = torch.zeros((), dtype=torch.float64)
    vocab_size = head.shape[0]
    for state, word in zip(hidden, next_ids, strict=True):
        scores = [state @ row for row in head]
        normaliser = torch.log(sum(torch.exp(score) for score in scores))
        for entry, score in enumerate(scores):
            target = smoothing / vocab_size + (1 - smoothing if entry == word else 0)
            total = total - target * (score - normaliser)
    return total / max(1, len(next_ids)) if reduction == "mean" else total


def problem(words: int = 7, vocab_size: int = 5, width: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(words, width, dtype=torch.float64, generator=generator).requires_grad_()
    head = torch.randn(vocab_size, width, dtype=torch.float64, generator=generator).requires_grad_()
    return hidden, torch.randint(0, vocab_size, (words,), generator=generator), head


@given(
    words=st.integers(0, 9),
    vocab_size=st.integers(1, 6),
    chunk_words=st.integers(1, 12),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_value_and_gradients_equal_the_written_out_formula(words, vocab_size, chunk_words, smoothing, reduction, seed):
    hidden, next_ids, head = problem(words, vocab_size, seed=seed)
    loss = captioning_loss(
        hidden, next_ids, head, label_smoothing=smoothing, reduction=reduction, chunk_words=chunk_words
    )
    expected = naive_loss(hidden, next_ids.tolist(), head, smoothing, reduction)
    torch.testing.assert_close(loss, expected)
    assert loss.dtype == torch.float64
    # Scaled, as by a loss weight.
    ours = torch.autograd.grad(2.5 * loss, (hidden, head))
    if words:
        torch.testing.assert_close(ours, torch.autograd.grad(2.5 * expected, (hidden, head)))
    else:
        assert not any(gradient.any() for gradient in ours)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("chunk_words", [2, 7])
def test_gradients_by_finite_differences(smoothing: float, chunk_words: int):
    hidden, next_ids, head = problem()
    assert torch.autograd.gradcheck(
        lambda h, w: captioning_loss(h, next_ids, w, label_smoothing=smoothing, chunk_words=chunk_words),
        (hidden, head),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_torchs_cross_entropy_agrees(smoothing: float, reduction):
    hidden, next_ids, head = problem(words=50, vocab_size=40, width=8)
    expected = F.cross_entropy(hidden @ head.T, next_ids, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(
        captioning_loss(hidden, next_ids, head, label_smoothing=smoothing, reduction=reduction), expected
    )


def test_only_the_gradients_that_are_needed():
    hidden, next_ids, head = problem()
    expected = torch.autograd.grad(captioning_loss(hidden, next_ids, head), (hidden, head))
    (by_hidden,) = torch.autograd.grad(captioning_loss(hidden, next_ids, head.detach()), hidden)
    (by_head,) = torch.autograd.grad(captioning_loss(hidden.detach(), next_ids, head), head)
    torch.testing.assert_close((by_hidden, by_head), expected)
    assert not captioning_loss(hidden.detach(), next_ids, head.detach()).requires_grad


def test_gradients_accumulate_and_the_graph_can_be_kept():
    hidden, next_ids, head = problem()
    loss = captioning_loss(hidden, next_ids, head)
    loss.backward(retain_graph=True)
    once = head.grad.clone()
    loss.backward()
    torch.testing.assert_close(head.grad, 2 * once)


def test_second_derivatives_are_refused_rather_than_wrong():
    hidden, next_ids, head = problem()
    loss = captioning_loss(hidden, next_ids, head).square()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_an_uninformed_model_pays_the_logarithm_of_the_vocabulary():
    hidden, next_ids = torch.zeros(6, 3, dtype=torch.float64), torch.arange(6) % 5
    for smoothing in (0.0, 0.1):
        loss = captioning_loss(hidden, next_ids, torch.randn(5, 3).double(), label_smoothing=smoothing)
        assert loss.item() == pytest.approx(math.log(5))


def test_large_logits_stay_finite():
    hidden, next_ids, head = problem()
    hidden = (1000 * hidden.detach()).float().requires_grad_()
    loss = captioning_loss(hidden, next_ids, head.float(), label_smoothing=0.1)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


def test_the_callers_tensors_are_left_alone():
    hidden, next_ids, head = problem()
    before = hidden.detach().clone(), next_ids.clone(), head.detach().clone()
    captioning_loss(hidden, next_ids, head, chunk_words=2).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, next_ids, head), strict=True))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_low_precision_is_close_to_full(requires_grad: bool):
    hidden, next_ids, head = (x.detach() for x in problem(words=64, vocab_size=100, width=32))
    hidden, head = hidden.float().requires_grad_(requires_grad), head.float().requires_grad_(requires_grad)
    expected = captioning_loss(hidden, next_ids, head)
    with torch.autocast("cpu", torch.bfloat16):
        low = captioning_loss(hidden, next_ids, head, chunk_words=10)
    # The products are rounded to 8 bits; their sums and the loss are not.
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, atol=0.02, rtol=0.01)
    if requires_grad:
        for mine, other in zip(
            torch.autograd.grad(low, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True
        ):
            assert mine.dtype == torch.float32
            assert F.cosine_similarity(mine.flatten(), other.flatten(), dim=0) > 0.999


class Operations(TorchDispatchMode):
    """Counts matrix products and remembers the most elements that a result had."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        self.products += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return out


def test_logits_exist_for_one_chunk_at_a_time():
    words, vocab_size, width, chunk = 300, 200, 4, 8
    hidden, next_ids, head = problem(words, vocab_size, width)
    with Operations() as operations:
        captioning_loss(hidden, next_ids, head, chunk_words=chunk, label_smoothing=0.1).backward()
    assert operations.largest == max(chunk * vocab_size, words * width)
    with Operations() as operations:
        F.cross_entropy(hidden @ head.T, next_ids).backward()
    assert operations.largest == words * vocab_size  # the measure does see one


def test_validation_pays_for_no_gradient():
    hidden, next_ids, head = problem()
    with Operations() as training:
        value = captioning_loss(hidden, next_ids, head, chunk_words=7)
    with Operations() as validation, torch.no_grad():
        assert torch.equal(captioning_loss(hidden, next_ids, head, chunk_words=7), value)
    assert (validation.products, training.products) == (1, 3)


WRONG = [
    ({"reduction": "none"}, "'none' is neither mean nor sum"),
    ({"label_smoothing": 1.0}, r"label_smoothing 1\.0"),
    ({"label_smoothing": -0.1}, r"label_smoothing -0\.1"),
    ({"chunk_words": 0}, "chunk_words 0"),
    ({"chunk_words": -1}, "chunk_words -1"),
]


@pytest.mark.parametrize(("settings", "sentence"), WRONG, ids=str)
def test_impossible_settings(settings: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        captioning_loss(*problem(), **settings)


def test_states_and_labels_must_be_as_many():
    hidden, next_ids, head = problem()
    with pytest.raises(ValueError, match="differ in their words"):
        captioning_loss(hidden, next_ids[:-1], head)
