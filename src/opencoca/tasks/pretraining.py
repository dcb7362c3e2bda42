"""Pretraining on image-text pairs, by the contrastive and the captioning loss (paper, section 3.1), or one of them.

Captions that the network samples may be rewarded as well (see `self_critical`). A linear branch has a contrastive loss
of its own, and may begin with what a sentence encoder and the image encoder's classifier tell (see `sentences`).
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
from opencoca.model.structure import PARTS
from opencoca.tasks.self_critical import SampledWords, SelfCritic
from opencoca.tasks.sentences import start_linear_branch
from opencoca.tasks.task import Compared, Outputs, Score, Term, Uses
from opencoca.tokenizer import Tokenizer

_CAPTIONS, _RETRIEVAL = "captions of validation images", "retrieval among validation images"
_MOST_NEW_TOKENS, _MOST_SAMPLES = 10_000, 100
_LINEAR = "linear_branch"
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
        contrastive_of: all: the deep embeddings, and those of a linear branch (model.linear) by themselves; linear: of
            the linear branch alone, which takes a fraction of the time where everything else is frozen.
        sentences: the linear branch begins with what this file of texts and vectors tells, see
            scripts/embed_sentences.py, and with the classes of the image encoder's classifier.
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
    contrastive_of: Literal["all", "linear"] = "all"
    sentences: str | None = None
    label_smoothing: float = 0.0
    contrastive_reduction: Literal["mean", "sum"] = "mean"
    caption_reduction: Literal["mean", "sum"] = "mean"
    select_by: Literal["score", "cider_d", "mean_r1", "loss"] = "score"
    max_new_tokens: int = 30

    needs_samples: ClassVar[bool] = False

    @property
    def uses(self) -> Uses:
        """Which halves of the network have a loss."""
        captioning = self.caption_weight != 0 or self.reward_weight != 0
        return Uses(self.contrastive_weight != 0, captioning, self.contrastive_of == "linear")

    def __post_init__(self) -> None:
        weights = ("contrastive_weight", "caption_weight", "reward_weight")
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
        if self.contrastive_of == "linear" and (not self.contrastive_weight or self.uses.captioning):
            raise ValueError(
                "task.contrastive_of linear trains the linear branch alone: set task.contrastive_weight to more than "
                "0, and caption_weight and reward_weight to 0"
            )
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
        per_word = "word" if options.caption_reduction == "mean" else None
        terms = (
            Term("contrastive", options.contrastive_weight, across_batch=True),
            Term("caption", options.caption_weight, per_word),
            Term("reward", options.reward_weight, "sampled caption"),
        )
        self.terms = tuple(term for term in terms if term.weight)

    def configure(self, config: CoCaConfig) -> CoCaConfig:
        if self.uses.linear_alone and not config.linear.dim:
            raise ValueError("task.contrastive_of linear needs a network with a linear branch: set model.linear.dim")
        return config

    def prepare(self, network: CoCa, tokenizer: Tokenizer, begins: bool = True) -> str | None:
        said = None
        if begins and self.options.sentences is not None:
            said = start_linear_branch(network, tokenizer, Path(self.options.sentences))
        elif begins and network.linear_branch is not None and network.linear_branch.lacks_classes():
            raise ValueError(
                "model.linear.class_dim is fitted to the image encoder's classifier where a training has "
                "task.sentences; set that, or class_dim to 0"
            )
        if self.options.reward_weight:
            assert self._source is not None
            options = self.options
            self._critic = SelfCritic(self._source, tokenizer, options.reward_samples, options.max_new_tokens)
        return said

    def stored(self) -> dict[str, Any] | None:
        return None

    def unreached(self, network: CoCa) -> Sequence[nn.Parameter]:
        unused = list(network.unused_parameters(self.uses.contrastive, self.uses.captioning))
        if not self.uses.linear_alone:
            return unused
        return unused + network.structure().parameters(*(part for part in PARTS if part != _LINEAR))

    def counts(self, batch: Batch) -> dict[str, int]:
        # The first token of a text is never predicted.
        sampled = batch.num_samples * self.options.reward_samples
        return {"word": batch.num_tokens - len(batch.token_ids), "sampled caption": sampled}

    def forward(self, network: CoCa, batch: Batch, compared_only: bool = False) -> Outputs:
        assert batch.images is not None
        features = network.image_features(batch.images, batch.from_stage)
        rows: tuple[Tensor, ...] = ()
        scales: tuple[Tensor, ...] = ()
        if self.options.contrastive_weight and network.linear_logit_scale is not None:
            rows = network.linear_embeds(features, batch.token_ids, batch.token_mask)
            scales = (network.linear_logit_scale,)
        if self.uses.linear_alone:
            return Outputs(Compared(rows, batch.sample_ids, scales), ())
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
            deep = network.deep_embeds(output.image_embed), network.deep_embeds(output.text_embed)
            compared = Compared((*deep, *rows), batch.sample_ids, (output.logit_scale, *scales))
        if compared_only:
            return Outputs(compared, ())
        own = [] if output.hidden is None or output.next_ids is None else [output.hidden, output.next_ids]
        if self._critic is not None:
            own += self._critic.sample(network, features, batch.sample_ids)
        return Outputs(compared, tuple(own))

    def compare(self, compared: Compared, world: World) -> dict[str, Tensor]:
        reduction, ids = self.options.contrastive_reduction, compared.sample_ids
        encoders = zip(compared.rows[::2], compared.rows[1::2], compared.shared, strict=True)
        losses = [contrastive_loss(*encoder, ids, reduction=reduction, world=world) for encoder in encoders]
        return {"contrastive": sum(losses[1:], losses[0])}

    def losses(self, network: CoCa, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        own, found = iter(outputs.own), {}
        if self.options.caption_weight:
            smoothing, weight = self.options.label_smoothing, network.vocab_weight
            loss = captioning_loss(next(own), next(own), weight, label_smoothing=smoothing, reduction="sum")
            found["caption"] = loss
        if self._critic is not None:
            found["reward"] = SampledWords(next(own), next(own), next(own)).loss(network)
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
                label_smoothing=0.0,
            )
        )

    def after_update(self, network: CoCa) -> None:
        network.clamp_logit_scale()

    def monitors(self, network: CoCa) -> dict[str, float]:
        scales = {"logit_scale": network.logit_scale, "linear_logit_scale": network.linear_logit_scale}
        found = {name: float(scale.detach()) for name, scale in scales.items() if scale is not None}
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
