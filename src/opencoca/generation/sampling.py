"""Sampling: which tokens may be drawn, and drawing one with randomness that belongs to the text, not to the batch.

Letters: R texts in work, V vocabulary, K tokens that may be drawn, T positions.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from opencoca.generation.options import GenerationOptions
from opencoca.generation.top_candidates import top_candidates

# How many tokens top_p looks at first; most nuclei are smaller.
_FIRST_NUCLEUS = 128

_GOLDEN_RATIO = 0x9E3779B97F4A7C15
_MIX_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class Draws(NamedTuple):
    """The tokens that may be drawn: log_probs (R, K), normalised, -inf where not; token_ids (R, K), ascending."""

    log_probs: Tensor
    token_ids: Tensor


def drawable_tokens(log_probs: Tensor, options: GenerationOptions) -> Draws:
    """What may be drawn from log_probs (R, V): temperature, then top_k, then top_p, then min_p."""
    if options.temperature is not None:
        log_probs = log_probs / options.temperature
    values, ids = log_probs, None
    if options.top_k:
        values, ids = top_candidates(values, min(options.top_k, values.shape[1]))
    if options.top_p < 1:
        values, ids = _nucleus(values, ids, options.top_p)
    if options.min_p:
        best = values.amax(dim=1, keepdim=True)
        values = values.masked_fill(values.exp() < options.min_p * best.exp(), -torch.inf)
    if ids is None:
        ids = torch.arange(values.shape[1], device=values.device).expand_as(values)
    else:
        ids, order = ids.sort(dim=1)
        values = values.gather(1, order)
    return Draws(values.log_softmax(dim=1), ids)


def draw(draws: Draws, uniforms: Tensor) -> Tensor:
    """One token id of each row (R,): where its cumulative probability, in the order of ids, exceeds uniforms (R,)."""
    cumulative = draws.log_probs.to(torch.float64).exp().cumsum(dim=1)
    index = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)
    # Rounded up, a uniform number next to 1 may reach the sum; the last token that may be drawn is meant then.
    places = torch.arange(cumulative.shape[1], device=index.device)
    last = places.where(draws.log_probs > -torch.inf, 0).amax(dim=1, keepdim=True)
    index = index.minimum(last)
    return draws.token_ids.gather(1, index).squeeze(1)


def _nucleus(values: Tensor, ids: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The most probable tokens that reach top_p together, in descending order, the others at -inf."""
    total = values.logsumexp(dim=1, keepdim=True)
    count = values.shape[1] if ids is not None else min(_FIRST_NUCLEUS, values.shape[1])
    while True:
        best, best_ids = top_candidates(values, count)
        probabilities = (best - total).exp()
        reached = probabilities.cumsum(dim=1)
        if count == values.shape[1] or bool((reached[:, -1] >= top_p).all()):
            break
        count = min(8 * count, values.shape[1])
    # A token stays if those before it have not reached top_p: the first always does.
    kept = best.masked_fill(reached - probabilities >= top_p, -torch.inf)
    return kept, best_ids if ids is None else ids.gather(1, best_ids)


def uniform_numbers(seed: int, text_seeds: Tensor, num_positions: int) -> Tensor:
    """Numbers (R, T) in [0, 1), float64: a hash of seed, text_seeds (R,) int64 and position, so of nothing else.

    The hash is SplitMix64's (Steele, Lea and Flood 2014), in which every output bit depends on every input bit.
    """
    positions = torch.arange(1, num_positions + 1, device=text_seeds.device)
    start = _mix(_mix(torch.full_like(text_seeds, _signed(seed))) ^ text_seeds)
    bits = _mix(start[:, None] + positions * _signed(_GOLDEN_RATIO))
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def text_seeds(image_seeds: Tensor, num_captions: int) -> Tensor:
    """image_seeds (I,) int64 -> one seed for each caption, (I x num_captions,)."""
    captions = torch.arange(num_captions, device=image_seeds.device)
    return (_mix(image_seeds)[:, None] + captions * _signed(_GOLDEN_RATIO)).flatten()


def seeds_of_images(pixels: Tensor) -> list[int]:
    """A seed for each image (I, 3, height, width), preprocessed, made of its content.

    With these, an image has the same sampled captions wherever it stands and whatever it is batched with.
    """
    rows = pixels.detach().to("cpu", torch.float32).contiguous().flatten(1).view(torch.uint8).numpy()
    return [_signed(int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "little")) for row in rows]


def seed_of_name(name: str) -> int:
    """A seed made of an image's name, such as its path or its key in a data set."""
    return _signed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_FACTORS[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_FACTORS[1])
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # The sign bit would be copied in otherwise.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The lowest 64 bits of value as a signed number."""
    return (value + 2**63) % 2**64 - 2**63
