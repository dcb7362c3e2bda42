"""Captioning of a whole source: one caption an image, scored against its human captions."""

from collections.abc import Sequence
from dataclasses import dataclass

from opencoca.data import SampleSource
from opencoca.evaluation.caption_metrics import CaptionScores, caption_scores
from opencoca.evaluation.encoding import BrokenImage, EncodedImages, encode_images
from opencoca.evaluation.retrieval import with_captions
from opencoca.evaluation.runner import Scores, evaluate, numbers
from opencoca.generation import GenerationOptions, generate, seed_of_name
from opencoca.generation.decoding.session import DecodingSession
from opencoca.generation.rerank import check_rerank, generate_reranked, rerank_weight
from opencoca.inference.pipeline import Pipeline
from opencoca.tokenizer import Tokenizer
from opencoca.tokenizer.languages import texts_in


@dataclass(frozen=True)
class CaptioningReport:
    """scores: BLEU, ROUGE-L, CIDEr-D; captions: what the model wrote, and references: what people wrote, by key."""

    scores: CaptionScores
    captions: dict[str, str]
    references: dict[str, tuple[str, ...]]
    broken_images: tuple[BrokenImage, ...]
    num_images_without_captions: int


class CaptioningEvaluator:
    """Writes a caption for every image of a source, and compares it with the captions that people wrote.

    Captions are written in the tokenizer's language, and compared with those in it. Images without one do not count.

    rerank_weight: how much the similarity of image and text counts in the choice among candidates; None: not at all.
    """

    def __init__(
        self,
        source: SampleSource,
        tokenizer: Tokenizer,
        options: GenerationOptions,
        rerank_weight: float | None = None,
    ):
        self.source, self.tokenizer, self.options, self.rerank_weight = source, tokenizer, options, rerank_weight
        self._session: DecodingSession | None = None

    def rows(self, images: EncodedImages) -> dict[str, str]:
        """Captions by key."""
        keys = [self.source.key(index) for index in images.indices]
        # What is drawn at random depends on an image's name, so that the size of a batch does not matter.
        seeds = [seed_of_name(key) for key in keys]
        if self._session is None or self._session.model is not images.network:
            self._session = DecodingSession(images.network)
        if self.rerank_weight is None:
            written = generate(
                images.network, images.tokens, self.tokenizer, self.options, image_seeds=seeds, session=self._session
            )
        else:
            choice = self.tokenizer, self.options, self.rerank_weight
            written = generate_reranked(
                images.network, images.pooled, *choice, image_seeds=seeds, session=self._session
            )
        return {key: best.text for key, (best, *_) in zip(keys, written, strict=True)}

    def scores(self, rows: Sequence[dict[str, str]]) -> Scores:
        self._session = None  # its memory is not needed between two evaluations
        captions = {key: text for part in rows for key, text in part.items()}
        position = {self.source.key(index): index for index in range(len(self.source))}
        language = self.tokenizer.language
        references = {key: texts_in(self.source.captions(position[key]), language) for key in captions}
        references = {key: own for key, own in references.items() if own}
        found = caption_scores({key: captions[key] for key in references}, references, language)
        return Scores(numbers(found), (found, references), captions)


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
    captioned = with_captions(source, language=pipeline.tokenizer.language)
    options = options or GenerationOptions()
    check_rerank(options, rerank)
    evaluator = CaptioningEvaluator(captioned, pipeline.tokenizer, options, rerank_weight(rerank))
    batches = encode_images(pipeline, captioned, batch_size, progress=progress, description="captioning images")
    (found,), broken = evaluate(batches, evaluator, wanted="images that can be read and have captions")
    scores, references = found.detail
    return CaptioningReport(scores, found.texts, references, broken, len(source) - len(captioned))
