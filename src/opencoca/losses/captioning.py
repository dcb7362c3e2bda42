"""The captioning loss: every word is predicted from the image and the words before it.

Paper, section 3.1, equation 2. The logits over the vocabulary exist only for a chunk of words at a time, and the
chunk's gradient is taken at once, so that memory does not grow with words x vocabulary and nothing is computed twice.
Letters: S words that have a next word, D width, V vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of a chunk, and of the part of it that is in work at a time on a CPU.
CHUNK_LOGITS, CACHED_LOGITS = 1 << 24, 1 << 18
LEAST_CHUNK_WORDS = 1024


def captioning_loss(
    hidden: Tensor,
    next_ids: Tensor,
    head_weight: Tensor,
    *,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_words: int | None = None,
) -> Tensor:
    """Cross-entropy of the next words; a scalar in float32 (or float64 if hidden is).

    hidden (S, D); next_ids (S,) the words to predict; head_weight (V, D) of the vocabulary head.
    label_smoothing: this part of the target is spread evenly over the vocabulary. reduction: ``mean`` over words, as
    common implementations do, or ``sum``, as the paper's formula. chunk_words: words whose logits exist at a time; None
    = 16 million logits' worth, 1,024 at least.
    Raises ValueError for settings out of range and for shapes that do not belong together.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is neither mean nor sum")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing {label_smoothing} must be at least 0 and less than 1")
    if chunk_words is None:
        chunk_words = max(LEAST_CHUNK_WORDS, CHUNK_LOGITS // head_weight.shape[0])
    if chunk_words < 1:
        raise ValueError(f"chunk_words {chunk_words} must be at least 1")
    if hidden.shape[:1] != next_ids.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and next_ids {tuple(next_ids.shape)} differ in their words")
    if not torch.is_grad_enabled():
        # A custom function is asked for gradients of leaves even where none will be taken: validation must not pay.
        hidden, head_weight = hidden.detach(), head_weight.detach()
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    total = _ChunkedCrossEntropy.apply(hidden, head_weight, next_ids, label_smoothing, chunk_words)
    return total / max(1, next_ids.numel()) if reduction == "mean" else total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over words of the smoothed cross-entropy; the gradients are made in the forward pass, chunk by chunk.

    A word's loss is its logits' log-sum-exp, minus (1 - smoothing) times its own logit, minus smoothing times the mean
    logit; the gradient by its logits is their softmax minus the smoothed target.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, chunk: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        vocab_size = weight.shape[0]
        wants_grad = any(ctx.needs_input_grad[:2])
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=wide)
        if smoothing:
            mean_logits = hidden.to(wide).sum(0) @ weight.to(wide).sum(0) / vocab_size
            total -= smoothing * mean_logits
        for start in range(0, hidden.shape[0], chunk):
            rows, targets = hidden[start : start + chunk], labels[start : start + chunk]
            logits = rows @ weight.T
            total -= (1 - smoothing) * logits.gather(1, targets[:, None]).to(wide).sum()
            total += _exchange_for_softmax(logits, wide, smoothing / vocab_size, wants_grad)
            if not wants_grad:
                continue
            at_target = torch.arange(len(rows), device=logits.device) * vocab_size + targets
            logits.view(-1)[at_target] -= 1 - smoothing
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[start : start + chunk])
            if weight_grad is not None:
                weight_grad += logits.T @ rows
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * scale.to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * scale).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None


def _exchange_for_softmax(logits: Tensor, wide: torch.dtype, minus: float, wants_softmax: bool) -> Tensor:
    """Sum of the log-sum-exp of the rows of logits (S, V), in ``wide``; puts their softmax - minus in their place."""
    total = logits.new_zeros((), dtype=wide)
    # On a CPU, rows that fit its cache are done with before the next ones come.
    step = max(1, CACHED_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), step):
        part = logits[start : start + step]
        largest = part.amax(dim=1, keepdim=True).to(wide)
        exponentials = part.to(wide).sub(largest).exp_()
        sums = exponentials.sum(dim=1, keepdim=True)
        total += (largest + sums.log()).sum()
        if wants_softmax:
            exponentials.div_(sums)
            part.copy_(exponentials.sub_(minus) if minus else exponentials)
    return total
