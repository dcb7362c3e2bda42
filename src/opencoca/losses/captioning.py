"""The captioning loss: every word is predicted from the image and the words before it.

Paper, section 3.1, equation 2. The logits over the vocabulary exist only for a chunk of words at a time, and the
chunk's gradient is taken at once, so that memory does not grow with words x vocabulary and nothing is computed twice.
Letters: S words that have a next word, D width, V vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_WORDS = 1024


def captioning_loss(
    hidden: Tensor,
    next_ids: Tensor,
    head_weight: Tensor,
    *,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_words: int = CHUNK_WORDS,
) -> Tensor:
    """Cross-entropy of the next words; a scalar in float32 (or float64 if hidden is).

    hidden (S, D); next_ids (S,) the words to predict; head_weight (V, D) of the vocabulary head.
    label_smoothing: this part of the target is spread evenly over the vocabulary. reduction: ``mean`` over words, as
    common implementations do, or ``sum``, as the paper's formula. chunk_words: words whose logits exist at a time.
    Raises ValueError for settings out of range and for shapes that do not belong together.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is neither mean nor sum")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing {label_smoothing} must be at least 0 and less than 1")
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
    """Sum over words of the smoothed cross-entropy; the gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, chunk: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        vocab_size = weight.shape[0]
        for start in range(0, hidden.shape[0], chunk):
            rows = hidden[start : start + chunk]
            targets = labels[start : start + chunk]
            log_probs = torch.log_softmax((rows @ weight.T).to(wide), dim=1)
            total -= (1 - smoothing) * log_probs.gather(1, targets[:, None]).sum()
            if smoothing:
                total -= smoothing / vocab_size * log_probs.sum()
            if hidden_grad is None and weight_grad is None:
                continue
            grad = log_probs.exp_()
            if smoothing:
                grad -= smoothing / vocab_size
            flat, at_target = grad.view(-1), torch.arange(len(rows), device=grad.device) * vocab_size + targets
            flat[at_target] -= 1 - smoothing
            grad = grad.to(weight.dtype)
            if hidden_grad is not None:
                torch.mm(grad, weight, out=hidden_grad[start : start + chunk])
            if weight_grad is not None:
                weight_grad += grad.T @ rows
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
