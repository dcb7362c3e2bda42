"""Retrieval of a whole source: how well its images find their captions, and the captions their images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from opencoca.data import SampleSource, Subset
from opencoca.evaluation.encoding import BrokenImage, EncodedImages, encode_images
from opencoca.evaluation.likelihood_retrieval import less_prior, reranked_scores, score_shortlist, shortlist
from opencoca.evaluation.retrieval_metrics import RetrievalScores, retrieval_scores
from opencoca.evaluation.runner import Scores, evaluate, numbers
from opencoca.inference.labels import Rule
from opencoca.inference.pipeline import Pipeline
from opencoca.tokenizer import Tokenizer
from opencoca.tokenizer.languages import texts_in

DEFAULT_RERANK_TOP = 16
_TEXTS_AT_A_TIME = 256


@dataclass(frozen=True)
class RetrievalReport:
    """scores: recalls and median ranks; images that were left out are in `broken_images` or only counted."""

    scores: RetrievalScores
    broken_images: tuple[BrokenImage, ...]
    num_images_without_captions: int


class Embedded(NamedTuple):
    """Images and all of their captions: image_embed (I, E), text_embed (M, E), float32 on the CPU.

    indices: of the images in the source; image_of_text (M,): which of them, from 0, each text describes.
    """

    indices: tuple[int, ...]
    image_embed: Tensor
    text_embed: Tensor
    image_of_text: Tensor

    @staticmethod
    def joined(parts: "Sequence[Embedded]") -> "Embedded":
        indices = tuple(index for part in parts for index in part.indices)
        before = torch.tensor([0, *(len(part.indices) for part in parts)]).cumsum(0).tolist()
        image_of_text = torch.cat([part.image_of_text + start for part, start in zip(parts, before, strict=False)])
        image_embed = torch.cat([part.image_embed for part in parts])
        return Embedded(indices, image_embed, torch.cat([part.text_embed for part in parts]), image_of_text)


class RetrievalEvaluator:
    """Embeds all images and all of their captions, and ranks them for each other by cosine."""

    def __init__(self, source: SampleSource, tokenizer: Tokenizer):
        self.source, self.tokenizer = source, tokenizer

    def rows(self, images: EncodedImages) -> Embedded:
        captions = [self.source.captions(index) for index in images.indices]
        texts = [text for own in captions for text in own]
        image_of_text = torch.tensor([row for row, own in enumerate(captions) for _ in own])
        embeds, network = [images.embed.new_empty(0, images.embed.shape[1])], images.network
        for start in range(0, len(texts), _TEXTS_AT_A_TIME):
            part = texts[start : start + _TEXTS_AT_A_TIME]
            batch = self.tokenizer(part, network.config.text.context_length)
            device = images.features.device
            output = network.encode_text(batch.token_ids.to(device), batch.token_mask.to(device))
            embeds.append(output.embed.float().cpu())
        return Embedded(images.indices, images.embed, torch.cat(embeds), image_of_text)

    def scores(self, rows: Sequence[Embedded]) -> Scores:
        found = Embedded.joined(rows)
        scores = retrieval_scores(found.image_embed, found.text_embed, found.image_of_text)
        return Scores(numbers(scores), (scores, found))


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
    batches = encode_images(pipeline, captioned, batch_size, progress=progress, description="embedding images")
    evaluator = RetrievalEvaluator(captioned, pipeline.tokenizer)
    (report,), broken = evaluate(batches, evaluator, wanted="images that can be read and have captions")
    scores, embedded = report.detail
    if by != "similarity":
        indices, image_embed, text_embed, image_of_text = embedded
        found = shortlist(image_embed, text_embed, rerank_top)
        readable = Subset(captioned, indices)
        again = encode_images(pipeline, readable, batch_size, progress=progress, description="scoring captions")
        scorer = pipeline.text_scorer([text for index in indices for text in captioned.captions(index)])
        likelihood = less_prior(found, score_shortlist(scorer, again, found))
        if by == "both":
            likelihood = likelihood + pipeline.model.logit_scale.item() * found.similarity
        scores = reranked_scores(image_embed, text_embed, image_of_text, found, likelihood)
    return RetrievalReport(scores, broken, len(source) - len(captioned))


def with_captions(source: SampleSource, indices: Iterable[int] | None = None, language: str | None = None) -> Subset:
    """The images of a source that have at least one caption, in this language if one is given."""
    wanted = range(len(source)) if indices is None else indices
    return Subset(source, [index for index in wanted if texts_in(source.captions(index), language)])
