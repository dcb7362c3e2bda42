"""Retrieval by the captioner: what the embeddings find first is ordered again by likelihood.

Scoring every text for every image would take I x M passes of the multimodal decoder, so that only the first K texts of
each image and the first K images of each text are scored; what comes after them keeps its rank.

Among the texts of an image, log p(text | image) favours the common and the short. So the text's own log-probability is
subtracted, estimated over the K images of the set that the text is most similar to: images of the set, but not whose
they are, have a part in an image's ranking of texts. The ranking of images for a text is not changed by it.

Letters: I images, M texts, E embed_dim, K that are ordered again, P pairs that are scored.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from opencoca.evaluation.encoding import EncodedImages
from opencoca.evaluation.retrieval_metrics import RetrievalScores, retrieval_ranks, scores_from_ranks
from opencoca.generation.scoring import TextScorer

_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Shortlist:
    """What the embeddings find first: image_top (I, K) texts of every image, text_top (M, K) images of every text.

    similarity: the cosine (P,) of each pair that is in either; images, texts (P,): which pair, sorted by image.
    """

    image_top: Tensor
    text_top: Tensor
    images: Tensor
    texts: Tensor
    similarity: Tensor


def shortlist(image_embed: Tensor, text_embed: Tensor, top: int) -> Shortlist:
    """image_embed (I, E), text_embed (M, E), float32 on the CPU. Raises ValueError if top is less than 2."""
    if top < 2:
        raise ValueError(f"rerank_top is {top}; it takes at least 2 to have an order")
    image_top = _first(image_embed, text_embed, top)
    text_top = _first(text_embed, image_embed, top)
    num_images, num_texts = len(image_embed), len(text_embed)
    of_images = torch.arange(num_images)[:, None] * num_texts + image_top
    of_texts = text_top * num_texts + torch.arange(num_texts)[:, None]
    pairs = torch.cat((of_images.flatten(), of_texts.flatten())).unique()
    images, texts = pairs // num_texts, pairs % num_texts
    chunks = zip(images.split(_ROWS_AT_A_TIME), texts.split(_ROWS_AT_A_TIME), strict=True)
    similarity = torch.cat([(image_embed[image] * text_embed[text]).sum(dim=1) for image, text in chunks])
    return Shortlist(image_top, text_top, images, texts, similarity)


def _first(queries: Tensor, others: Tensor, top: int) -> Tensor:
    """(queries, K): the most similar of the others."""
    chunks = queries.split(_ROWS_AT_A_TIME)
    return torch.cat([(chunk @ others.T).topk(min(top, len(others)), dim=1).indices for chunk in chunks])


def score_shortlist(scorer: TextScorer, batches: Iterable[EncodedImages], found: Shortlist) -> Tensor:
    """(P,): log p(text | image) of every pair; batches give the images once more, in the same order."""
    counts = torch.bincount(found.images, minlength=len(found.image_top))
    texts_of_image = found.texts.split(counts.tolist())
    scores: list[Tensor] = []
    for batch in batches:
        for tokens in batch.tokens:
            texts = texts_of_image[len(scores)]
            scores.append(scorer.score_chosen(tokens.unsqueeze(0), texts.unsqueeze(0)).squeeze(0).float().cpu())
    if len(scores) != len(texts_of_image):
        raise ValueError(f"{len(texts_of_image)} images could be read at first, but now {len(scores)}; start again")
    return torch.cat(scores)


def less_prior(found: Shortlist, scores: Tensor) -> Tensor:
    """log p(text | image) (P,) of the pairs -> less log p(text), the mean over each text's first K images (P,)."""
    listed = _of_pairs(found, scores, found.text_top, torch.arange(len(found.text_top))[:, None])
    prior = listed.logsumexp(dim=1) - math.log(listed.shape[1])
    return scores - prior[found.texts]


def reranked_scores(
    image_embed: Tensor, text_embed: Tensor, image_of_text: Tensor, found: Shortlist, scores: Tensor
) -> RetrievalScores:
    """Recalls and median ranks once the pairs found are ordered by scores (P,), higher being better.

    As in `retrieval_scores`, ties count against the query, and an image's other texts do not stand in its way.
    """
    image_ranks, text_ranks = retrieval_ranks(image_embed, text_embed, image_of_text)
    rows = torch.arange(len(image_embed))[:, None]
    listed = _of_pairs(found, scores, rows, found.image_top)
    image_ranks = _new_ranks(listed, image_of_text[found.image_top] == rows, image_ranks.cpu())
    rows = torch.arange(len(text_embed))[:, None]
    listed = _of_pairs(found, scores, found.text_top, rows)
    text_ranks = _new_ranks(listed, found.text_top == image_of_text[:, None], text_ranks.cpu())
    return scores_from_ranks(image_ranks, text_ranks)


def _of_pairs(found: Shortlist, values: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """The values (P,) of these pairs, all of which were found."""
    num_texts = len(found.text_top)
    return values[torch.searchsorted(found.images * num_texts + found.texts, images * num_texts + texts)]


def _new_ranks(listed: Tensor, right: Tensor, old_ranks: Tensor) -> Tensor:
    """listed (queries, K) scores, right (queries, K) answers -> (queries,); the old rank where none is listed."""
    best = listed.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(right.any(dim=1), 1 + ((listed >= best) & ~right).sum(dim=1), old_ranks)
