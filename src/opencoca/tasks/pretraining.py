"""Pretraining on image-text pairs, by the contrastive and the captioning loss (paper, section 3.1), or one of them.

Further terms: similarities with names of classes learn what the image encoder's own classifier says (see `naming`),
the text tower learns from a sentence encoder (see `sentences`), and captions that the network samples are rewarded (see
`self_critical`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
from opencoca.tasks.naming import Namer, imagined_images
from opencoca.tasks.self_critical import SampledWords, SelfCritic
from opencoca.tasks.sentences import SentenceTeacher
from opencoca.tasks.task import Compared, Outputs, Score, Term, Uses
from opencoca.tokenizer import Tokenizer

_CAPTIONS, _RETRIEVAL = "captions of validation images", "retrieval among validation images"
_MOST_NEW_TOKENS, _MOST_SAMPLES = 10_000, 100
_R1 = ("image_to_text_r1", "text_to_image_r1")


@dataclass(frozen=True)
class PretrainingOptions:
    """The objective (paper, section 3.1). A weight of 0 skips that term's work.

    Args:
        name: pretraining.
        contrastive_weight: lambda_con.
        caption_weight: lambda_cap.
        reward_weight: of self-critical training (arXiv 1612.00563): captions that the network samples are made likelier
            if people's captions of the image speak for them (CIDEr-D), less likely if not. For the last epochs of a
            training, at a low learning rate; it costs about twice a captioning loss of as many captions.
        reward_samples: how many captions of each image are sampled for it.
        naming_weight: of naming: the similarities of an image with names of ImageNet's classes learn to say what the
            classifier that the image encoder comes with says of it (KL divergence). For efficientnet_lite0 to 2 with
            encoder.init imagenet.
        naming_classes: how many of the 1,000 classes are drawn for a batch.
        sentence_weight: of sentences: the text tower's [CLS] vector learns the direction of a sentence encoder's vector
            of the same text (one minus the cosine).
        sentences: the file of texts and their vectors that it learns from, see scripts/embed_sentences.py.
        sentence_texts: how many of the file's texts are drawn for a batch.
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
    reward_weight: float = 0.0
    reward_samples: int = 5
    naming_weight: float = 0.0
    naming_classes: int = 128
    sentence_weight: float = 0.0
    sentences: str | None = None
    sentence_texts: int = 256
    label_smoothing: float = 0.0
    contrastive_reduction: Literal["mean", "sum"] = "mean"
    caption_reduction: Literal["mean", "sum"] = "mean"
    select_by: Literal["score", "cider_d", "mean_r1", "loss"] = "score"
    max_new_tokens: int = 30

    needs_samples: ClassVar[bool] = False

    @property
    def uses(self) -> Uses:
        """Which halves of the network have a loss."""
        contrastive = self.contrastive_weight != 0 or self.naming_weight != 0 or self.sentence_weight != 0
        return Uses(contrastive, self.caption_weight != 0 or self.reward_weight != 0)

    def __post_init__(self) -> None:
        weights = ("contrastive_weight", "caption_weight", "reward_weight", "naming_weight", "sentence_weight")
        for weight in weights:
            if not 0 <= getattr(self, weight) < float("inf"):
                raise ValueError(f"task.{weight} {getattr(self, weight)} must be at least 0")
        if not any(getattr(self, weight) for weight in weights):
            raise ValueError(f"{', '.join(f'task.{weight}' for weight in weights)} are all 0: nothing would be learned")
        if not 2 <= self.reward_samples <= _MOST_SAMPLES:
            raise ValueError(
                f"task.reward_samples {self.reward_samples} must be 2, as samples are compared with each other, to "
                f"{_MOST_SAMPLES}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"task.label_smoothing {self.label_smoothing} must be at least 0 and less than 1")
        if self.naming_classes < 2:
            raise ValueError(f"task.naming_classes {self.naming_classes} must be at least 2")
        if self.sentence_texts < 1:
            raise ValueError(f"task.sentence_texts {self.sentence_texts} must be at least 1")
        if self.sentence_weight and self.sentences is None:
            raise ValueError("task.sentence_weight needs task.sentences, the file of texts and their vectors")
        if not 1 <= self.max_new_tokens <= _MOST_NEW_TOKENS:
            raise ValueError(
                f"task.max_new_tokens {self.max_new_tokens} must be at least 1 and at most {_MOST_NEW_TOKENS:,}"
            )
        has_score = {"cider_d": self.uses.captioning, "mean_r1": self.uses.contrastive}.get(self.select_by, True)
        if not has_score:
            needs = "caption_weight" if self.select_by == "cider_d" else "contrastive_weight"
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
        self.options, self._source = options, source
        self.uses = options.uses
        self._critic: SelfCritic | None = None
        self._namer: Namer | None = None
        self._teacher: SentenceTeacher | None = None
        per_word = "word" if options.caption_reduction == "mean" else None
        terms = (
            Term("contrastive", options.contrastive_weight, across_batch=True),
            Term("caption", options.caption_weight, per_word),
            Term("reward", options.reward_weight, "sampled caption"),
            Term("naming", options.naming_weight, "named image"),
            Term("sentence", options.sentence_weight, "sentence"),
        )
        self.terms = tuple(term for term in terms if term.weight)

    def configure(self, config: CoCaConfig) -> CoCaConfig:
        return config

    def prepare(self, network: CoCa, tokenizer: Tokenizer) -> None:
        if self.options.naming_weight:
            self._namer = Namer(network, tokenizer, self.options.naming_classes)
        if self.options.sentence_weight:
            assert self.options.sentences is not None
            count = self.options.sentence_texts
            self._teacher = SentenceTeacher(Path(self.options.sentences), network, tokenizer, count)
        if self.options.reward_weight:
            assert self._source is not None
            options = self.options
            self._critic = SelfCritic(self._source, tokenizer, options.reward_samples, options.max_new_tokens)

    def stored(self) -> dict[str, Any] | None:
        return None

    def unreached(self, network: CoCa) -> Sequence[nn.Parameter]:
        return list(network.unused_parameters(self.uses.contrastive, self.uses.captioning))

    def counts(self, batch: Batch) -> dict[str, int]:
        # The first token of a text is never predicted.
        sampled = batch.num_samples * self.options.reward_samples
        counts = {"word": batch.num_tokens - len(batch.token_ids), "sampled caption": sampled}
        named = batch.num_samples + imagined_images(batch.num_samples)
        return counts | {"named image": named, "sentence": self.options.sentence_texts}

    def forward(self, network: CoCa, batch: Batch, compared_only: bool = False) -> Outputs:
        assert batch.images is not None
        features = network.image_features(batch.images, batch.from_stage)
        output = network(
            features,
            batch.token_ids,
            batch.token_mask,
            from_stage=network.structure().image_encoder.num_stages,
            contrastive=self.uses.contrastive,
            captioning=self.options.caption_weight != 0 and not compared_only,
        )
        compared = None
        if self.options.contrastive_weight and output.image_embed is not None and output.text_embed is not None:
            rows = output.image_embed, output.text_embed
            compared = Compared(rows, batch.sample_ids, (output.logit_scale,))
        if compared_only:
            return Outputs(compared, ())
        own = [] if output.hidden is None or output.next_ids is None else [output.hidden, output.next_ids]
        if self._critic is not None:
            own += self._critic.sample(network, features, batch.sample_ids)
        if self._namer is not None:
            assert output.image_embed is not None
            said = self._namer.say(batch.images, batch.from_stage, features)
            own += [features, output.image_embed, said]
        return Outputs(compared, tuple(own))

    def compare(self, compared: Compared, world: World) -> dict[str, Tensor]:
        (images, texts), (scale,), reduction = compared.rows, compared.shared, self.options.contrastive_reduction
        loss = contrastive_loss(images, texts, scale, compared.sample_ids, reduction=reduction, world=world)
        return {"contrastive": loss}

    def losses(self, network: CoCa, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        own, found = iter(outputs.own), {}
        if self.options.caption_weight:
            smoothing, weight = self.options.label_smoothing, network.vocab_weight
            loss = captioning_loss(next(own), next(own), weight, label_smoothing=smoothing, reduction="sum")
            found["caption"] = loss
        if self._critic is not None:
            found["reward"] = SampledWords(next(own), next(own), next(own)).loss(network)
        if self._namer is not None:
            found["naming"] = self._namer.loss(network, next(own), next(own), next(own))
        if self._teacher is not None:
            found["sentence"] = self._teacher.loss(network)
        return found

    def validated(self) -> "Pretraining":
        # Where training has neither of the paper's losses, validation reports those of the halves that are trained.
        options, uses = self.options, self.uses
        contrastive, caption = options.contrastive_weight, options.caption_weight
        return Pretraining(
            replace(
                options,
                contrastive_weight=contrastive or float(uses.contrastive),
                caption_weight=caption or float(uses.captioning),
                reward_weight=0.0,
                naming_weight=0.0,
                sentence_weight=0.0,
                label_smoothing=0.0,
            )
        )

    def after_update(self, network: CoCa) -> None:
        network.clamp_logit_scale()

    def monitors(self, network: CoCa) -> dict[str, float]:
        found = {"logit_scale": float(network.logit_scale.detach())}
        return found if self._critic is None else found | {"sampled_cider_d": 100 * self._critic.mean_reward}

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
