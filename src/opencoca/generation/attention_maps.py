"""Where the captioner looks for each word: attention weights over the image, recomputed from the modules' projections.

The map of a word is that of the position that predicts it, the position before: that is where the image is looked at
to choose the word. Where the caption pooler has learned queries, what a word takes from an image token is passed on to
the image features that the token is made of, so that a map always lies on the features' grid.

Letters: I images, B texts, T text positions, W words, L multimodal layers, H heads, Q image tokens, N image features,
D width, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opencoca.generation.scoring import word_log_probs
from opencoca.model.attention_maps import cross_attention, pooler_attention
from opencoca.model.coca import CoCa
from opencoca.tokenizer import Tokenizer

# Encoders round the number of cells along a side; a cell is stretched by that, never by much more.
_MOST_STRETCH = 1.5


@dataclass(frozen=True)
class WordMaps:
    """The words of one text and where in the image each of them looks.

    words: W words of the text, split at spaces.
    weights: (L, H, W, N), over the image's features; what a word's tokens look at on average; rows sum to 1.
    grid: (rows, columns) of the features in the image, rows * columns = N less the features before the grid.
    log_probs: (W,) log-probability of each word given the image and the words before it, in nats.
    """

    words: tuple[str, ...]
    weights: Tensor
    grid: tuple[int, int]
    log_probs: Tensor

    def mean(self, layers: Sequence[int] | None = None) -> Tensor:
        """(W, rows, columns): the mean over heads and over these layers (None: all), each map summing to at most 1.

        Negative layers count from the last. Raises ValueError for a layer that the decoder does not have.
        """
        depth = self.weights.shape[0]
        chosen = list(range(depth)) if layers is None else list(layers)
        if not chosen:
            raise ValueError("there are no layers to average over; give at least one, or None for all")
        if wrong := [layer for layer in chosen if not -depth <= layer < depth]:
            raise ValueError(f"there is no layer {wrong[0]}: the decoder has {depth}, numbered 0 to {depth - 1}")
        on_grid = self.weights[chosen].mean(dim=(0, 1))[:, -self.grid[0] * self.grid[1] :]
        return on_grid.unflatten(1, self.grid)


@torch.inference_mode()
def word_maps(model: CoCa, tokenizer: Tokenizer, image: Tensor, text: str) -> WordMaps:
    """The maps of one text, a caption of the model's or any other, over one image (3, height, width), preprocessed.

    Raises ValueError if the text has no words, or the features are no grid.
    """
    batch = tokenizer([text], model.config.text.context_length)
    features = model.image_features(image.unsqueeze(0))
    grid = feature_grid(features.shape[1], (image.shape[1], image.shape[2]))
    image_tokens = model.pool_image(features).tokens
    token_ids = batch.token_ids.to(image.device)
    attention, hidden = cross_attention(model, token_ids[:, :-1], image_tokens)
    log_probs = word_log_probs(model, hidden[0], token_ids[0, 1:])
    pooled = pooler_attention(model, features)
    weights = attention[:, 0] if pooled is None else attention[:, 0] @ pooled.mean(dim=1)
    first = tokenizer.prompt_length
    words, word_of_token = split_words(tokenizer, token_ids[0, first:-1].tolist())
    if not words:
        raise ValueError(f"the text {text[:40]!r} has no words to show maps of")
    # (W, T - 2, or T - 3 behind a language): which tokens make a word up.
    member = F.one_hot(torch.tensor(word_of_token), len(words)).T.to(weights)
    share = member / member.sum(dim=1, keepdim=True)
    return WordMaps(
        words=words,
        weights=(share @ weights[:, :, first - 1 : -1]).cpu(),
        grid=grid,
        log_probs=(member.to(log_probs) @ log_probs[first - 1 : -1]).cpu(),
    )


def feature_grid(num_features: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the features of an image of this (height, width): the grid whose cells are nearest to squares.

    One feature before the grid (a class token) is allowed for. Raises ValueError if no grid has that many features.
    """
    height, width = image_size
    best, least = (0, 0), _MOST_STRETCH
    for count in (num_features, num_features - 1):
        for rows in (rows for rows in range(1, count + 1) if count % rows == 0):
            shape = (height / rows) / (width * rows / count)
            if (stretch := max(shape, 1 / shape)) < least:
                best, least = (rows, count // rows), stretch
    if best == (0, 0):
        raise ValueError(
            f"the image encoder gives {num_features} features for an image of {height} x {width} pixels, which form "
            "no grid; maps over the image can be drawn only for encoders that keep one"
        )
    return best


def split_words(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[tuple[str, ...], list[int]]:
    """The words of token ids (without start and end), and for each token the number of the word it belongs to."""
    words = tuple(tokenizer.decode(token_ids).split())
    lengths = range(1, len(token_ids) + 1)
    counts = [len(text.split()) for text in tokenizer.decode_batch([token_ids[:length] for length in lengths])]
    return words, [min(max(0, count - 1), len(words) - 1) for count in counts]
