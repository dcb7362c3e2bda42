"""Retrieval of a whole source: how well its images find their captions, and the captions their images."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

import torch

from opencoca.data import SampleSource, Subset
from opencoca.evaluation.encoding import BrokenImage, encode_images, require_images
from opencoca.evaluation.likelihood_retrieval import less_prior, reranked_scores, score_shortlist, shortlist
from opencoca.evaluation.retrieval_metrics import RetrievalScores, retrieval_scores
from opencoca.inference.labels import Rule
from opencoca.inference.pipeline import Pipeline

DEFAULT_RERANK_TOP = 16


@dataclass(frozen=True)
class RetrievalReport:
    """scores: recalls and median ranks; images that were left out are in `broken_images` or only counted."""

    scores: RetrievalScores
    broken_images: tuple[BrokenImage, ...]
    num_images_without_captions: int


def evaluate_retrieval(
    pipeline: Pipeline,
    source: SampleSource,
    *,
    by: Rule = "similarity",
    rerank_top: int = DEFAULT_RERANK_TOP,
    batch_size: int = 32,
    progress: bool = False,
) -> RetrievalReport:
    """Embeds all images and all of their captions, and ranks them for each other.

    by: ``similarity`` ranks by cosine alone; ``likelihood`` orders the first rerank_top of each image and of each text
        again by the captioner (see `likelihood_retrieval`), ``both`` by the sum of the likelihood and the cosine times
        the logit scale. These two take a second pass over the images.

    Raises ValueError if no image can be read and has a caption, or for a rule that does not exist.
    """
    if by not in get_args(Rule):
        raise ValueError(f"cannot rank by {by!r}; choose {', '.join(get_args(Rule))}")
    captioned = with_captions(source)
    embeds: list[torch.Tensor] = []
    kept: list[int] = []
    broken: list[BrokenImage] = []
    for batch in encode_images(pipeline, captioned, batch_size, progress=progress, description="embedding images"):
        embeds.append(batch.embed)
        kept += batch.indices
        broken += batch.broken
    require_images(len(kept), broken, "images that can be read and have captions")
    captions = [captioned.captions(index) for index in kept]
    texts = [text for own in captions for text in own]
    image_of_text = torch.tensor([row for row, own in enumerate(captions) for _ in own])
    image_embed, text_embed = torch.cat(embeds), pipeline.embed_texts(texts)
    if by == "similarity":
        scores = retrieval_scores(image_embed, text_embed, image_of_text)
    else:
        found = shortlist(image_embed, text_embed, rerank_top)
        readable = Subset(captioned, kept)
        again = encode_images(pipeline, readable, batch_size, progress=progress, description="scoring captions")
        likelihood = less_prior(found, score_shortlist(pipeline.text_scorer(texts), again, found))
        if by == "both":
            likelihood = likelihood + pipeline.model.logit_scale.item() * found.similarity
        scores = reranked_scores(image_embed, text_embed, image_of_text, found, likelihood)
    return RetrievalReport(scores, tuple(broken), len(source) - len(captioned))


def with_captions(source: SampleSource, indices: Iterable[int] | None = None) -> Subset:
    """The images of a source that have at least one caption."""
    wanted = range(len(source)) if indices is None else indices
    return Subset(source, [index for index in wanted if source.captions(index)])
