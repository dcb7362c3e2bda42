"""Pretraining on image-text pairs, by the contrastive and the captioning loss (paper, section 3.1), or one of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from opencoca.data import Batch, SampleSource, Target
from opencoca.distributed.world import World
from opencoca.evaluation.captioning import CaptioningEvaluator
from opencoca.evaluation.retrieval import RetrievalEvaluator
from opencoca.evaluation.runner import Evaluator
from opencoca.generation import GenerationOptions
from opencoca.losses import captioning_loss, contrastive_loss
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.tasks.task import Compared, Outputs, Score, Term, Uses
from opencoca.tokenizer import Tokenizer

_CAPTIONS, _RETRIEVAL = "captions of validation images", "retrieval among validation images"
_MOST_NEW_TOKENS = 10_000
_R1 = ("image_to_text_r1", "text_to_image_r1")


@dataclass(frozen=True)
class PretrainingOptions:
    """The objective (paper, section 3.1). A weight of 0 skips that half's work.

    Args:
        name: pretraining.
        contrastive_weight: lambda_con.
        caption_weight: lambda_cap.
        label_smoothing: the part of the captioning target that is spread over the vocabulary.
        contrastive_reduction: mean or sum of the two directions.
        caption_reduction: mean or sum over words.
        select_by: the validation score that chooses the best weights: score (CIDEr-D x 100 + both R@1, in percent),
            cider_d, mean_r1, or loss.
        max_new_tokens: the longest caption that is written for validation, in tokens.
    """

    name: Literal["pretraining"] = "pretraining"
    contrastive_weight: float = 1.0
    caption_weight: float = 2.0
    label_smoothing: float = 0.0
    contrastive_reduction: Literal["mean", "sum"] = "mean"
    caption_reduction: Literal["mean", "sum"] = "mean"
    select_by: Literal["score", "cider_d", "mean_r1", "loss"] = "score"
    max_new_tokens: int = 30

    needs_samples: ClassVar[bool] = False

    @property
    def uses(self) -> Uses:
        """Which halves of the network have a loss."""
        return Uses(contrastive=self.contrastive_weight != 0, captioning=self.caption_weight != 0)

    def __post_init__(self) -> None:
        for weight in ("contrastive_weight", "caption_weight"):
            if not 0 <= getattr(self, weight) < float("inf"):
                raise ValueError(f"task.{weight} {getattr(self, weight)} must be at least 0")
        if self.contrastive_weight == 0 and self.caption_weight == 0:
            raise ValueError("task.contrastive_weight and task.caption_weight are both 0: nothing would be learned")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"task.label_smoothing {self.label_smoothing} must be at least 0 and less than 1")
        if not 1 <= self.max_new_tokens <= _MOST_NEW_TOKENS:
            raise ValueError(
                f"task.max_new_tokens {self.max_new_tokens} must be at least 1 and at most {_MOST_NEW_TOKENS:,}"
            )
        needs = {"cider_d": "caption_weight", "mean_r1": "contrastive_weight"}.get(self.select_by)
        if needs and getattr(self, needs) == 0:
            raise ValueError(f"task.select_by {self.select_by} has no score to go by, because task.{needs} is 0")


class Pretraining:
    """Images and texts that belong together: the network learns to match them and to write the texts."""

    name = "pretraining"
    reads_texts = True
    encode_target: Callable[[Target | None], np.ndarray] | None = None
    scores = (
        Score("loss", "loss", 1.0, 3, headline=True),
        Score("caption_loss", "caption loss", 1.0, 3),
        Score("contrastive_loss", "contrastive loss", 1.0, 3),
        Score("cider_d", "CIDEr-D", chart=_CAPTIONS, headline=True),
        Score("bleu_4", "BLEU-4", chart=_CAPTIONS, headline=True),
        Score("rouge_l", "ROUGE-L"),
        Score("image_to_text_r1", "image to text R@1", chart=_RETRIEVAL, headline=True),
        Score("text_to_image_r1", "text to image R@1", chart=_RETRIEVAL, headline=True),
    )

    def __init__(self, options: PretrainingOptions, source: SampleSource | None = None):
        self.options = options
        self.uses = options.uses
        per_word = "word" if options.caption_reduction == "mean" else None
        terms = (
            Term("contrastive", options.contrastive_weight, across_batch=True),
            Term("caption", options.caption_weight, per_word),
        )
        self.terms = tuple(term for term in terms if term.weight)

    def configure(self, config: CoCaConfig) -> CoCaConfig:
        return config

    def stored(self) -> dict[str, Any] | None:
        return None

    def unreached(self, network: CoCa) -> Sequence[nn.Parameter]:
        return list(network.unused_parameters(self.uses.contrastive, self.uses.captioning))

    def counts(self, batch: Batch) -> dict[str, int]:
        # The first token of a text is never predicted.
        return {"word": batch.num_tokens - len(batch.token_ids)}

    def forward(self, network: CoCa, batch: Batch, compared_only: bool = False) -> Outputs:
        output = network(
            batch.images,
            batch.token_ids,
            batch.token_mask,
            from_stage=batch.from_stage,
            contrastive=self.uses.contrastive,
            captioning=self.uses.captioning and not compared_only,
        )
        compared = None
        if output.image_embed is not None and output.text_embed is not None:
            rows = output.image_embed, output.text_embed
            compared = Compared(rows, batch.sample_ids, (output.logit_scale,))
        own = () if output.hidden is None or output.next_ids is None else (output.hidden, output.next_ids)
        return Outputs(compared, own)

    def compare(self, compared: Compared, world: World) -> dict[str, Tensor]:
        (images, texts), (scale,), reduction = compared.rows, compared.shared, self.options.contrastive_reduction
        loss = contrastive_loss(images, texts, scale, compared.sample_ids, reduction=reduction, world=world)
        return {"contrastive": loss}

    def losses(self, network: CoCa, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not outputs.own:
            return {}
        (hidden, next_ids), weight = outputs.own, network.vocab_weight
        smoothing = self.options.label_smoothing
        return {"caption": captioning_loss(hidden, next_ids, weight, label_smoothing=smoothing, reduction="sum")}

    def validated(self) -> "Pretraining":
        return Pretraining(replace(self.options, label_smoothing=0.0))

    def after_update(self, network: CoCa) -> None:
        network.clamp_logit_scale()

    def monitors(self, network: CoCa) -> dict[str, float]:
        return {"logit_scale": float(network.logit_scale.detach())}

    def evaluators(self, source: SampleSource, tokenizer: Tokenizer) -> tuple[Evaluator, ...]:
        if not any(source.captions(index) for index in range(len(source))):
            raise ValueError(
                "none of the validation images has a caption; set data.val_captions, or no data.val_images"
            )
        found: list[Evaluator] = []
        if self.uses.contrastive:
            found.append(RetrievalEvaluator(source, tokenizer))
        if self.uses.captioning:
            options = GenerationOptions(max_new_tokens=self.options.max_new_tokens)
            found.append(CaptioningEvaluator(source, tokenizer, options))
        return tuple(found)

    def selection(self, scores: dict[str, float]) -> float:
        r1 = [scores[name] for name in _R1 if name in scores]
        match self.options.select_by:
            case "loss":
                return -scores["loss"]
            case "cider_d":
                return scores["cider_d"]
            case "mean_r1":
                return float(np.mean(r1))
        return 100 * (scores.get("cider_d", 0.0) + sum(r1))
