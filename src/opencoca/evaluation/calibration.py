"""Fits what turns a caption's scores into its confidence, and checks that the confidence keeps its word.

Letters: N captions that were judged.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opencoca.generation.confidence import CaptionCalibration
from opencoca.inference.pipeline import Pipeline
from opencoca.inference.preprocess import ImageLike

_RIDGE = 1.0
_ITERATIONS = 200


class CaptionScores(NamedTuple):
    """What confidence is read from: the mean log-probability of a caption's tokens, and its similarity to its image."""

    mean_log_probability: float
    similarity: float


class Bin(NamedTuple):
    """Captions of similar confidence: their mean confidence, the share of them that is right, and their number."""

    predicted: float
    observed: float
    count: int


def caption_scores(pipeline: Pipeline, image: ImageLike, caption: str) -> CaptionScores:
    """Scores a caption of an image as generation scores those that it writes, the end token included."""
    log_probability = pipeline.score_captions([image], caption).item()
    # The start token is given, and the language's.
    length = int(pipeline.tokenizer(caption).token_mask.sum()) - pipeline.tokenizer.prompt_length
    return CaptionScores(log_probability / length, pipeline.similarity([image], caption).item())


def fit_calibration(scores: Tensor, right: Tensor) -> CaptionCalibration:
    """Fits the logistic regression, with a slight pull of both weights towards 0 (in units of the scores' spread).

    Args:
        scores: (N, 2), mean log-probability and similarity, as `caption_scores` gives them.
        right: (N,), 1 for a caption that a person called right, else 0.

    Raises:
        ValueError: all captions are right, or none is.
    """
    right = right.double()
    if not 0 < right.sum() < len(right):
        raise ValueError("to fit a calibration, some of the captions must be right and some wrong")
    scores = scores.double()
    mean, spread = scores.mean(dim=0), scores.std(dim=0, correction=0).clamp(min=1e-9)
    standard = (scores - mean) / spread
    parameters = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([parameters], max_iter=_ITERATIONS, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        logits = parameters[0] + standard @ parameters[1:]
        value = F.binary_cross_entropy_with_logits(logits, right, reduction="sum")
        value = value + _RIDGE / 2 * parameters[1:].square().sum()
        value.backward()
        return value

    search.step(loss)  # pyright: ignore[reportArgumentType]
    found = parameters.detach()
    weights = found[1:] / spread
    return CaptionCalibration((found[0] - weights @ mean).item(), weights[0].item(), weights[1].item())


def held_out_confidences(scores: Tensor, right: Tensor, groups: Tensor, num_folds: int = 5) -> Tensor:
    """The confidence (N,) of each caption by a calibration that was fitted without its fold.

    scores, right: as in `fit_calibration`. groups: (N,), whole numbers; captions of one group (of one image) are in the
    same fold. Raises ValueError as `fit_calibration` does.
    """
    confidences = torch.zeros(len(scores), dtype=torch.float64)
    for fold in range(num_folds):
        left_out = groups % num_folds == fold
        if not left_out.any():
            continue
        calibration = fit_calibration(scores[~left_out], right[~left_out])
        confidences[left_out] = torch.tensor(
            [calibration(*pair) for pair in scores[left_out].tolist()], dtype=torch.float64
        )
    return confidences


def reliability(confidences: Tensor, right: Tensor, num_bins: int = 5) -> list[Bin]:
    """Sorts captions (N,) into bins of equal width by their confidence, and counts what is right in each.

    A bin without captions is left out. Confidence that keeps its word has predicted = observed in every bin, up to
    chance.
    """
    places = (confidences * num_bins).long().clamp(max=num_bins - 1)
    bins = []
    for place in range(num_bins):
        inside = places == place
        if inside.any():
            chosen = confidences[inside].mean().item(), right[inside].double().mean().item()
            bins.append(Bin(*chosen, int(inside.sum())))
    return bins
