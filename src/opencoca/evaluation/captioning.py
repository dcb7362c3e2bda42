"""Captioning of a whole source: one caption an image, scored against its human captions."""

from dataclasses import dataclass

from opencoca.data import SampleSource
from opencoca.evaluation.caption_metrics import CaptionScores, caption_scores
from opencoca.evaluation.encoding import BrokenImage, encode_images, require_images
from opencoca.evaluation.retrieval import with_captions
from opencoca.generation import GenerationOptions
from opencoca.generation.rerank import check_rerank
from opencoca.inference.pipeline import Pipeline


@dataclass(frozen=True)
class CaptioningReport:
    """scores: BLEU, ROUGE-L, CIDEr-D; captions: what the model wrote, and references: what people wrote, by key."""

    scores: CaptionScores
    captions: dict[str, str]
    references: dict[str, tuple[str, ...]]
    broken_images: tuple[BrokenImage, ...]
    num_images_without_captions: int


def evaluate_captioning(
    pipeline: Pipeline,
    source: SampleSource,
    options: GenerationOptions | None = None,
    *,
    rerank: bool | float = False,
    batch_size: int = 32,
    progress: bool = False,
) -> CaptioningReport:
    """Captions every image that has human captions, and scores the best caption of each.

    rerank: as in `Pipeline.caption`. What is drawn at random depends on the options' seed and the image's key.

    Raises ValueError if no image can be read and has a caption, or if the options leave nothing to rerank.
    """
    captioned = with_captions(source)
    options = options or GenerationOptions()
    check_rerank(options, rerank)
    captions: dict[str, str] = {}
    references: dict[str, tuple[str, ...]] = {}
    broken: list[BrokenImage] = []
    for batch in encode_images(pipeline, captioned, batch_size, progress=progress, description="captioning images"):
        keys = [captioned.key(index) for index in batch.indices]
        written = pipeline.caption_encoded(batch.tokens, batch.embed, options, names=keys, rerank=rerank)
        for index, key, (best, *_) in zip(batch.indices, keys, written, strict=True):
            captions[key] = best.text
            references[key] = captioned.captions(index)
        broken += batch.broken
    require_images(len(captions), broken, "images that can be read and have captions")
    scores = caption_scores(captions, references)
    return CaptioningReport(scores, captions, references, tuple(broken), len(source) - len(captioned))
