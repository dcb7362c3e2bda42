"""The contrastive loss: images and texts that belong together are more alike than those that do not.

Paper, section 3.1, equation 1, over the images and texts of all processes. Each process compares its own rows with all
columns, a chunk of rows at a time, and makes the gradient of its own embeddings at once: similarities exist for a chunk
alone, and nothing but embeddings and four numbers a row goes between processes.
Letters: I images and B texts of one process, E embed_dim, R rows of a chunk, N rows or columns of all processes.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opencoca.distributed.world import World

# Similarities that exist at a time.
CHUNK_SIMILARITIES = 1 << 22


def contrastive_loss(
    image_embed: Tensor,
    text_embed: Tensor,
    logit_scale: Tensor | float,
    image_ids: Tensor | None = None,
    text_image_ids: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_rows: int | None = None,
    world: World | None = None,
) -> Tensor:
    """Symmetric InfoNCE with several texts an image; a scalar in float32 (or float64 if the embeddings are).

    image_embed (I, E) and text_embed (B, E), of length 1; logit_scale = 1 / temperature.
    image_ids (I,): which image each row is (default: all differ). text_image_ids (B,): which image each text
    describes (default: B / I consecutive texts an image). Rows with equal ids are positives of one another and never
    each other's negatives: the loss of a pair compares it with the true negatives alone.
    reduction: ``mean`` averages over pairs and over the two directions, as common implementations do; ``sum`` adds the
    two directions, each averaged over pairs, as the paper's formula does.
    chunk_rows: rows whose similarities exist at a time; None = 4 million similarities' worth.
    world: the processes whose rows (as many as each has, or none) are one batch, told apart by their ids; all call.
    The result is then this process's part: the parts add up to the loss of the whole batch, and so do the gradients.
    Raises ValueError if a text describes an image that is not there, and for another reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is neither mean nor sum")
    world = world or World()
    if world.size > 1 and image_ids is None:
        raise ValueError("image_ids are needed to tell the images of several processes apart")
    num_images, num_texts = image_embed.shape[0], text_embed.shape[0]
    if image_ids is None:
        image_ids = torch.arange(num_images, device=image_embed.device)
    if text_image_ids is None:
        if num_texts % max(1, num_images):
            raise ValueError(f"{num_texts} texts cannot be shared out evenly among {num_images} images")
        text_image_ids = image_ids.repeat_interleave(num_texts // max(1, num_images))
    if not torch.is_grad_enabled():
        # A custom function is asked for gradients of leaves even where none will be taken: validation must not pay.
        image_embed, text_embed = image_embed.detach(), text_embed.detach()
    scale = torch.as_tensor(logit_scale, device=image_embed.device)
    scale = scale if torch.is_grad_enabled() else scale.detach()
    with torch.autocast(image_embed.device.type, enabled=False):  # a scale of 100 needs all digits
        both = _InfoNCE.apply(image_embed, text_embed, scale, image_ids, text_image_ids, chunk_rows, world)
    return both / 2 if reduction == "mean" else both


class _RowSums(NamedTuple):
    """Sums for each row (R,): log-sum-exp of its negatives, losses of its pairs, their slopes, the number of pairs."""

    negatives: Tensor
    losses: Tensor
    slopes: Tensor
    pairs: Tensor


class _InfoNCE(torch.autograd.Function):
    """Both directions, averaged over pairs and added; the gradients are made in the forward pass.

    With logits x, and a(r) the log-sum-exp of the negatives of row r, a pair (r, c) costs log(1 + exp(a(r) - x)) in
    the direction of r. Its slope, sigmoid(a(r) - x), is its gradient by -x, and each negative of r shares that slope
    in proportion to exp(x - a(r)). So the gradient by the logits of a row needs two numbers of every row and column:
    a, and the sum of its pairs' slopes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        image_ids: Tensor,
        text_ids: Tensor,
        chunk_rows: int | None,
        world: World,
    ) -> Tensor:
        wide = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
        ctx.dtypes = images.dtype, texts.dtype, scale.dtype
        images, texts, scale = images.to(wide), texts.to(wide), scale.to(wide)
        all_counts = world.gather_counts(len(images), len(texts))
        counts = [[count[kind] for count in all_counts] for kind in (0, 1)]
        image_side, text_side = (
            _Side(rows, ids, world.gather_rows(rows, count), world.gather_rows(ids, count))
            for rows, ids, count in zip((images, texts), (image_ids, text_ids), counts, strict=True)
        )
        image_sums = _sum_rows(image_side, text_side, scale, chunk_rows)
        text_sums = _sum_rows(text_side, image_side, scale, chunk_rows)
        all_images, all_texts = (
            _RowSums(*world.gather_rows(torch.stack(sums, dim=1), count).unbind(dim=1))
            for sums, count in zip((image_sums, text_sums), counts, strict=True)
        )
        num_pairs = all_texts.pairs.sum()
        if not bool(all_texts.pairs.all()):
            raise ValueError("a text describes an image that is not in the batch")
        grads = []
        for wanted, side, other, row_sums, column_sums in (
            (ctx.needs_input_grad[0], image_side, text_side, image_sums, all_texts),
            (ctx.needs_input_grad[1] or ctx.needs_input_grad[2], text_side, image_side, text_sums, all_images),
        ):
            grad = _gradient(side, other, scale, (row_sums, column_sums), chunk_rows) if wanted else None
            grads.append(None if grad is None else grad / num_pairs)
        if grads[1] is not None:
            # The scale multiplies every logit, and each belongs to one row of one process's texts.
            grads.append((grads[1] * texts).sum() / scale)
        ctx.save_for_backward(*grads)
        return (image_sums.losses.sum() + text_sums.losses.sum()) / num_pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        grads: list[Tensor | None] = [None, None, None]
        for index, grad in enumerate(ctx.saved_tensors):
            if ctx.needs_input_grad[index] and grad is not None:
                grads[index] = (grad * upstream).to(ctx.dtypes[index])
        return (*grads, None, None, None, None)


class _Side(NamedTuple):
    """The embeddings and ids of the images, or of the texts: this process's rows, and those of all as columns."""

    rows: Tensor
    ids: Tensor
    columns: Tensor
    column_ids: Tensor


def _chunks(side: _Side, other: _Side, scale: Tensor, chunk_rows: int | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields slices of a side's rows, their logits (R, N) and which of these are pairs."""
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_SIMILARITIES // max(1, len(other.columns)))
    for start in range(0, len(side.rows), chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = (scale * side.rows[rows]) @ other.columns.T
        yield rows, logits, side.ids[rows, None] == other.column_ids


def _sum_rows(side: _Side, other: _Side, scale: Tensor, chunk_rows: int | None) -> _RowSums:
    """The sums of every row of a side over the columns of the other."""
    parts = [side.rows.new_zeros(4, 0)]
    for _, logits, is_pair in _chunks(side, other, scale, chunk_rows):
        negatives = logits.masked_fill(is_pair, -torch.inf).logsumexp(dim=1)
        row, column = is_pair.nonzero(as_tuple=True)
        gaps = negatives[row] - logits[row, column]  # -inf where a row has no negatives: no loss, no slope
        of_pairs = torch.stack((torch.logaddexp(gaps, gaps.new_zeros(())), gaps.sigmoid(), torch.ones_like(gaps)))
        sums = logits.new_zeros(3, len(logits)).index_add_(1, row, of_pairs)
        parts.append(torch.cat((negatives[None], sums)))
    return _RowSums(*torch.cat(parts, dim=1))


def _gradient(
    side: _Side, other: _Side, scale: Tensor, sums: tuple[_RowSums, _RowSums], chunk_rows: int | None
) -> Tensor:
    """(rows, E): of the losses of all pairs in both directions, by a side's rows; sums: of its rows, of all columns."""
    grad, (row_sums, columns) = torch.zeros_like(side.rows), sums
    for rows, logits, is_pair in _chunks(side, other, scale, chunk_rows):
        own = _RowSums(*(values[rows, None] for values in row_sums))
        shares = own.slopes * (logits - own.negatives).exp_()
        shares += columns.slopes * (logits - columns.negatives).exp_()
        at = is_pair.nonzero(as_tuple=True)
        of_pairs = logits[at]
        shares[at] = -torch.sigmoid(own.negatives[at[0], 0] - of_pairs)
        shares[at] -= torch.sigmoid(columns.negatives[at[1]] - of_pairs)
        torch.mm(shares, other.columns, out=grad[rows])
    return grad.mul_(scale)
