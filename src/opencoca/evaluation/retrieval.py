"""Retrieval of a whole source: how well its images find their captions, and the captions their images."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from opencoca.data import ImageTextSource, Subset
from opencoca.evaluation.encoding import BrokenImage, encode_images, require_images
from opencoca.evaluation.retrieval_metrics import RetrievalScores, retrieval_scores
from opencoca.pipeline import Pipeline


@dataclass(frozen=True)
class RetrievalReport:
    """scores: recalls and median ranks; images that were left out are in `broken_images` or only counted."""

    scores: RetrievalScores
    broken_images: tuple[BrokenImage, ...]
    num_images_without_captions: int


def evaluate_retrieval(
    pipeline: Pipeline, source: ImageTextSource, *, batch_size: int = 32, progress: bool = False
) -> RetrievalReport:
    """Embeds all images and all of their captions, and ranks them for each other.

    Raises ValueError if no image can be read and has a caption.
    """
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
    texts = pipeline.embed_texts(text for own in captions for text in own)
    image_of_text = torch.tensor([row for row, own in enumerate(captions) for _ in own])
    scores = retrieval_scores(torch.cat(embeds), texts, image_of_text)
    return RetrievalReport(scores, tuple(broken), len(source) - len(captioned))


def with_captions(source: ImageTextSource, indices: Iterable[int] | None = None) -> Subset:
    """The images of a source that have at least one caption."""
    wanted = range(len(source)) if indices is None else indices
    return Subset(source, [index for index in wanted if source.captions(index)])
