"""Classification: an attentional pooler of one query and a linear map over the image encoder's features.

Paper, sections 3.3 and 4.2.1: the pooler is learned anew for the task, and the encoder stays frozen or is finetuned.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.data import Batch, SampleSource, Target
from opencoca.distributed.world import World
from opencoca.evaluation.classification import HeadEvaluator
from opencoca.evaluation.runner import Evaluator
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, HeadConfig
from opencoca.tasks.task import Compared, Outputs, Score, Term, Uses
from opencoca.tokenizer import Tokenizer

_CHART = "accuracy on validation images"


@dataclass(frozen=True)
class ClassificationOptions:
    """Classification by a head that is trained (paper, sections 3.3 and 4.2.1).

    Args:
        name: classification.
        num_heads: attention heads of the pooler; None = one for every 64 channels of the image encoder.
        dropout: of the pooled vector, before the linear map.
        label_smoothing: the part of the target that is spread over all classes; the paper: 0.2 with a frozen encoder,
            0.5 with a finetuned one.
        class_weights: none (every image counts the same), or balanced (every class does: its images are weighed by the
            inverse of their number).
        select_by: the validation score that chooses the best weights: top1, mean_per_class, or loss.
    """

    name: Literal["classification"] = "classification"
    num_heads: int | None = None
    dropout: float = 0.0
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    select_by: Literal["top1", "mean_per_class", "loss"] = "top1"
    needs_samples: ClassVar[bool] = True

    @property
    def uses(self) -> Uses:
        """Neither half of the network: the image encoder is enough."""
        return Uses()

    def __post_init__(self) -> None:
        for key in ("label_smoothing", "dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"task.{key} {getattr(self, key)} must be at least 0 and less than 1")
        if self.num_heads is not None and self.num_heads < 1:
            raise ValueError(f"task.num_heads {self.num_heads} must be at least 1")


def class_number(numbers: Mapping[str, int], target: Target | None) -> np.ndarray:
    """The number of a class, as an array. Raises ValueError for anything else than a class."""
    if not isinstance(target, str) or target not in numbers:
        raise ValueError(f"{target!r} is none of the {len(numbers)} classes of the training images")
    return np.array(numbers[target], dtype=np.int64)


class Classification:
    """Images and their classes: a head learns to tell them apart."""

    name = "classification"
    uses = Uses()
    reads_texts = False
    scores = (
        Score("loss", "loss", 1.0, 3, headline=True),
        Score("top1", "top-1", chart=_CHART, headline=True),
        Score("top5", "top-5", chart=_CHART, headline=True),
        Score("mean_per_class", "mean per class", chart=_CHART, headline=True),
    )

    def __init__(
        self,
        options: ClassificationOptions,
        source: SampleSource | None = None,
        counts: Counter[str] | None = None,
    ):
        """source: the training samples, whose classes are learned. Raises ValueError if they have fewer than two."""
        self.options = options
        counts = count_classes(source) if counts is None else counts
        self.class_counts = counts
        self.classes = tuple(sorted(counts))
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.encode_target: Callable[[Target | None], np.ndarray] = partial(class_number, numbers)
        self.terms = (Term("classification", 1.0, "sample"),)
        self._weights = torch.ones(len(self.classes))
        if options.class_weights == "balanced":
            total = sum(counts.values())
            self._weights = torch.tensor([total / (len(counts) * counts[name]) for name in self.classes])

    def configure(self, config: CoCaConfig) -> CoCaConfig:
        head = HeadConfig(len(self.classes), self.options.num_heads, self.options.dropout)
        return replace(config, head=head)

    def prepare(self, network: CoCa, tokenizer: Tokenizer, begins: bool = True) -> str | None:
        return None

    def stored(self) -> dict[str, Any] | None:
        return {"name": self.name, "classes": list(self.classes)}

    @classmethod
    def from_stored(cls, content: Mapping[str, Any]) -> "Classification":
        return cls(ClassificationOptions(), counts=Counter(content["classes"]))

    def unreached(self, network: CoCa) -> Sequence[nn.Parameter]:
        parts = {part.name for part in network.structure().parts} - {"image_encoder", "task_head"}
        return network.structure().parameters(*parts)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"sample": batch.num_samples}

    def forward(self, network: CoCa, batch: Batch, compared_only: bool = False) -> Outputs:
        assert batch.images is not None
        features = network.image_features(batch.images, batch.from_stage)
        return Outputs(None, (network.head_logits(features),))

    def compare(self, compared: Compared, world: World) -> dict[str, Tensor]:
        return {}

    def losses(self, network: CoCa, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        (logits,), targets = outputs.own, batch.targets
        assert targets is not None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        each = F.cross_entropy(wide, targets, label_smoothing=self.options.label_smoothing, reduction="none")
        return {"classification": (self._weights.to(wide)[targets] * each).sum()}

    def validated(self) -> "Classification":
        options = replace(self.options, label_smoothing=0.0, class_weights="none")
        return Classification(options, counts=self.class_counts)

    def after_update(self, network: CoCa) -> None:
        pass

    def monitors(self, network: CoCa) -> dict[str, float]:
        return {}

    def evaluators(self, source: SampleSource, tokenizer: Tokenizer) -> tuple[Evaluator, ...]:
        return (HeadEvaluator(source, self.classes),)

    def selection(self, scores: dict[str, float]) -> float:
        return -scores["loss"] if self.options.select_by == "loss" else scores[self.options.select_by]


def count_classes(source: SampleSource | None) -> Counter[str]:
    """How many samples each class has. Raises ValueError if there are fewer than two classes."""
    counts: Counter[str] = Counter()
    for index in range(len(source) if source is not None else 0):
        assert source is not None
        target = source.target(index)
        if isinstance(target, str):
            counts[target] += 1
    if len(counts) < 2:
        raise ValueError(
            f"the training images have {len(counts)} classes, and classification needs at least two: give "
            "data.train_labels, a table with the columns image and label, or folders if each sub-folder is a class"
        )
    return counts
