"""Lengths of a batch of texts that is planned for, where there is none to measure."""

from statistics import NormalDist

import torch
from torch import Tensor

# Standard deviation over mean of Flickr8k's captions, in words of the CLIP vocabulary.
_SPREAD = 0.3
_LEAST_WORDS = 3


def likely_lengths(num_texts: int, mean_words: float, context_length: int) -> Tensor:
    """(B,) lengths with this mean, spread as captions' are: evenly spaced quantiles of a normal distribution.

    Raises ValueError if the mean is not between 3 and context_length.
    """
    if not _LEAST_WORDS <= mean_words <= context_length:
        raise ValueError(
            f"--words {mean_words:g} must be from {_LEAST_WORDS} to the model's context_length, {context_length}"
        )
    normal = NormalDist(mean_words, _SPREAD * mean_words)
    quantiles = [normal.inv_cdf((i + 0.5) / num_texts) for i in range(num_texts)]
    return torch.tensor(quantiles).round().long().clamp(_LEAST_WORDS, context_length)


def batch_of(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """token_ids (B, T) and token_mask (B, T) of texts of these lengths; the ids mean nothing."""
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    return torch.zeros(mask.shape, dtype=torch.int64), mask
