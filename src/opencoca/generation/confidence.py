"""Confidence: the probability that a person calls a caption right, read from the caption's scores.

Log-probabilities and similarities say which caption is better; what they are worth differs from model to model. A
logistic regression on captions that people judged turns both into a probability. `opencoca.evaluation.calibration`
fits it; a model's config.json keeps its three numbers under info, `caption_calibration`.

Letters: E embed_dim.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from opencoca.generation.options import GeneratedCaption
from opencoca.generation.rerank import with_similarities

CALIBRATION = "caption_calibration"


@dataclass(frozen=True)
class CaptionCalibration:
    """The logistic regression that gives a caption its confidence.

    bias, log_probability_weight, similarity_weight: confidence = 1 / (1 + exp(-(bias + log_probability_weight x mean
    log-probability of a token + similarity_weight x similarity of image and caption))).
    """

    bias: float
    log_probability_weight: float
    similarity_weight: float

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> "CaptionCalibration | None":
        """Reads it from a model folder's info, None where the folder has none.

        Raises ValueError if what is stored there is not its three numbers.
        """
        stored = info.get(CALIBRATION)
        if stored is None:
            return None
        names = [field.name for field in fields(cls)]
        if not isinstance(stored, Mapping) or sorted(stored) != sorted(names):
            raise ValueError(f"{CALIBRATION} of the model's info must have the entries {', '.join(names)}")
        for name in names:
            if type(stored[name]) not in (int, float) or not math.isfinite(stored[name]):
                raise ValueError(f"{CALIBRATION} of the model's info: {name} is no finite number")
        return cls(**{name: float(stored[name]) for name in names})

    def to_info(self) -> dict[str, dict[str, float]]:
        """Makes the entry of a model folder's info that `from_info` reads."""
        return {CALIBRATION: asdict(self)}

    def __call__(self, mean_log_probability: float, similarity: float) -> float:
        """The confidence, 0 to 1, in a caption with these scores."""
        logit = self.bias + self.log_probability_weight * mean_log_probability + self.similarity_weight * similarity
        return (1 + math.tanh(logit / 2)) / 2


def with_confidence(
    captions: Sequence[GeneratedCaption], image_embed: Tensor, calibration: CaptionCalibration
) -> tuple[GeneratedCaption, ...]:
    """The captions of one image, in the order given, with their similarity and confidence.

    image_embed (E,), of length 1. Raises ValueError if a caption was generated without its text embedding.
    """
    rated = []
    for caption in with_similarities(captions, image_embed):
        assert caption.similarity is not None
        confidence = calibration(caption.log_probability / caption.length, caption.similarity)
        rated.append(replace(caption, confidence=confidence))
    return tuple(rated)
