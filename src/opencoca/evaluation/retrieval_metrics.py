"""How well images find their captions and captions their image: recall at 1, 5 and 10 in both directions.

A pure function of embeddings, in the protocol of the Flickr and MSCOCO tables (CoCa paper, table 4): an image counts as
found when any of its captions is among the first K of all captions, a caption when its image is among the first K.

Letters: I images, M texts, E embed_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_CHUNK_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class RetrievalScores:
    """Recalls between 0 and 1 (tables print them times 100) and median ranks, 1 being the best."""

    image_to_text_r1: float
    image_to_text_r5: float
    image_to_text_r10: float
    text_to_image_r1: float
    text_to_image_r5: float
    text_to_image_r10: float
    image_to_text_median_rank: float
    text_to_image_median_rank: float
    num_images: int
    num_texts: int


@torch.no_grad()
def retrieval_scores(
    image_embed: Tensor, text_embed: Tensor, image_of_text: Tensor, chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> RetrievalScores:
    """Rank all texts for every image and all images for every text by the dot product of their embeddings.

    Args:
        image_embed: (I, E), normalised to length 1 where cosine similarity is meant, as CoCa's are.
        text_embed: (M, E), likewise.
        image_of_text: (M,) integers, the row of the image that each text describes; any number of texts an image.
        chunk_bytes: a bound for the similarities held at once; the (I, M) matrix never exists as a whole.

    An image's rank is that of its best text; its other texts do not stand in the way. Ties count against the query:
    everything as similar as the right answer ranks before it, so that an encoder whose embeddings are all equal finds
    nothing. Similarities are computed in float64, and count as equal when they differ by no more than its rounding
    error, so the order of rows, the chunk size and the device leave the result as it is.

    Raises:
        ValueError: shapes that do not fit, embeddings that are not finite, a text without its image or an image without
            a text.
    """
    return scores_from_ranks(*retrieval_ranks(image_embed, text_embed, image_of_text, chunk_bytes))


@torch.no_grad()
def retrieval_ranks(
    image_embed: Tensor, text_embed: Tensor, image_of_text: Tensor, chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Ranks from 1, of every image's best text (I,) and of every text's image (M,); all as `retrieval_scores`."""
    _check(image_embed, text_embed, image_of_text)
    device = torch.device("cpu") if image_embed.device.type == "mps" else image_embed.device  # MPS has no float64
    images = image_embed.to(device, torch.float64)
    texts = text_embed.to(device, torch.float64)
    return _ranks(images, texts, image_of_text.to(device, torch.int64), chunk_bytes)


def scores_from_ranks(image_ranks: Tensor, text_ranks: Tensor) -> RetrievalScores:
    """Recalls and medians of ranks from 1: of every image's best text (I,) and of every text's image (M,)."""

    def recall(ranks: Tensor, k: int) -> float:
        return (ranks <= k).double().mean().item()

    return RetrievalScores(
        *(recall(image_ranks, k) for k in (1, 5, 10)),
        *(recall(text_ranks, k) for k in (1, 5, 10)),
        image_to_text_median_rank=image_ranks.double().quantile(0.5).item(),
        text_to_image_median_rank=text_ranks.double().quantile(0.5).item(),
        num_images=len(image_ranks),
        num_texts=len(text_ranks),
    )


def _check(image_embed: Tensor, text_embed: Tensor, image_of_text: Tensor) -> None:
    if image_embed.ndim != 2 or text_embed.ndim != 2 or image_embed.shape[1] != text_embed.shape[1]:
        raise ValueError(
            f"image_embed has shape {tuple(image_embed.shape)} and text_embed {tuple(text_embed.shape)}: give two "
            "matrices of the same width, (I, E) and (M, E)."
        )
    if len(image_embed) == 0 or len(text_embed) == 0:
        raise ValueError(f"There are {len(image_embed)} images and {len(text_embed)} texts: give at least one of each.")
    if image_of_text.shape != (len(text_embed),) or image_of_text.is_floating_point():
        raise ValueError(
            f"image_of_text has shape {tuple(image_of_text.shape)} and type {image_of_text.dtype}: give one integer "
            f"for each of the {len(text_embed)} texts."
        )
    for name, embed in (("image_embed", image_embed), ("text_embed", text_embed)):
        finite = embed.isfinite().all(dim=1)
        if not finite.all():
            raise ValueError(
                f"Row {int((~finite).nonzero()[0])} of {name} is not finite: the model gave NaN or infinity."
            )
    outside = (image_of_text < 0) | (image_of_text >= len(image_embed))
    if outside.any():
        text = int(outside.nonzero()[0])
        raise ValueError(f"Text {text} belongs to image {int(image_of_text[text])} of {len(image_embed)}: no such row.")
    count = torch.bincount(image_of_text.long().cpu(), minlength=len(image_embed))
    if (count == 0).any():
        raise ValueError(f"Image {int((count == 0).nonzero()[0])} has no text that could be found: leave it out.")


def _ranks(images: Tensor, texts: Tensor, image_of_text: Tensor, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """Ranks from 1, of every image's best text (I,) and of every text's image (M,)."""
    num_images, num_texts = len(images), len(texts)
    # The same product summed in another order differs in its last bits; without a tolerance equal rows would not tie.
    tolerance = 1e-12 * (images.norm(dim=1).max() * texts.norm(dim=1).max()).item()
    rows = max(1, chunk_bytes // (num_texts * 16))  # 8 bytes a similarity, and as much again for the comparisons
    right = torch.empty(num_texts, dtype=torch.float64, device=images.device)  # a text with its own image
    for start in range(0, num_texts, step := max(1, chunk_bytes // (images.shape[1] * 24))):
        own = images[image_of_text[start : start + step]]
        right[start : start + step] = (own * texts[start : start + step]).sum(dim=1)
    best = torch.full((num_images,), -torch.inf, dtype=torch.float64, device=images.device)
    best.scatter_reduce_(0, image_of_text, right, "amax")

    image_ranks = torch.ones(num_images, dtype=torch.int64, device=images.device)
    text_ranks = torch.ones(num_texts, dtype=torch.int64, device=images.device)
    for start in range(0, num_images, rows):
        stop = min(start + rows, num_images)
        similarity = images[start:stop] @ texts.T
        # A right answer does not stand before another one, nor before itself.
        of_this_chunk = ((image_of_text >= start) & (image_of_text < stop)).nonzero().squeeze(1)
        similarity[image_of_text[of_this_chunk] - start, of_this_chunk] = -torch.inf
        image_ranks[start:stop] += (similarity >= best[start:stop, None] - tolerance).sum(dim=1)
        text_ranks += (similarity >= right - tolerance).sum(dim=0)
    return image_ranks, text_ranks
