"""All captions of a source as token ids in one flat array, and which of them an image shows in an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from opencoca.data.source import Sample, SampleSource
from opencoca.data.transforms import mentions_side

_CHUNK = 8192


class CaptionTokenizer(Protocol):
    """What batches need of a tokenizer."""

    @property
    def pad_id(self) -> int: ...

    def encode_batch(self, texts: list[str], context_length: int) -> list[list[int]]:
        """Token ids of each text, at most `context_length` of them."""
        ...


class ShownCaptions(NamedTuple):
    """What an image shows of its captions at one visit: token ids of each, and whether one speaks of left or right."""

    token_ids: list[np.ndarray]
    mention_side: bool


class TokenizedCaptions:
    """Captions of every image, tokenised once. Arrays rather than lists, so that worker processes share the memory.

    Args:
        source: the images and captions.
        tokenizer: see `CaptionTokenizer`.
        context_length: most token ids a caption may have.
    """

    def __init__(self, source: SampleSource, tokenizer: CaptionTokenizer, context_length: int):
        counts = [len(source.captions(index)) for index in range(len(source))]
        texts = [caption for index in range(len(source)) for caption in source.captions(index)]
        self.sides = np.fromiter(map(mentions_side, texts), dtype=bool, count=len(texts))
        self.image_starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        lengths: list[int] = []
        chunks: list[np.ndarray] = []
        for start in range(0, len(texts), _CHUNK):
            for ids in tokenizer.encode_batch(texts[start : start + _CHUNK], context_length):
                assert 0 < len(ids) <= context_length, f"{len(ids)} token ids for a context of {context_length}"
                lengths.append(len(ids))
                chunks.append(np.asarray(ids, dtype=np.int32))
        assert len(lengths) == len(texts)
        self.flat = np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.int32)
        self.caption_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def counts(self) -> np.ndarray:
        """Number of captions of each image, (num_images,)."""
        return np.diff(self.image_starts)

    def show(self, index: int, sample: Sample, wanted: int, bits: np.random.PCG64) -> ShownCaptions | None:
        """`wanted` captions of an image; `sample` is not used. None if it has none."""
        first, end = self.image_starts[index : index + 2]
        if first == end:
            return None
        chosen = first + choose_captions(int(end - first), wanted, bits)
        return ShownCaptions([self.token_ids(caption) for caption in chosen], bool(self.sides[chosen].any()))

    def token_ids(self, caption: int) -> np.ndarray:
        """Token ids of one caption, counted over the whole source."""
        return self.flat[self.caption_starts[caption] : self.caption_starts[caption + 1]]


class CaptionsOnDemand:
    """Captions tokenised when their image is shown: for sources that give them with the image, or make them up.

    Args: see `TokenizedCaptions`.
    """

    def __init__(self, source: SampleSource, tokenizer: CaptionTokenizer, context_length: int):
        self.source, self.tokenizer, self.context_length = source, tokenizer, context_length

    def show(self, index: int, sample: Sample, wanted: int, bits: np.random.PCG64) -> ShownCaptions | None:
        """`wanted` of a sample's texts, or texts that its source draws. None if there are none."""
        texts: list[str] | None = self.source.draw_texts(index, sample, wanted, bits)
        if texts is None and sample.texts:
            texts = [sample.texts[place] for place in choose_captions(len(sample.texts), wanted, bits).tolist()]
        if not texts:
            return None
        rows = self.tokenizer.encode_batch(texts, self.context_length)
        return ShownCaptions([np.asarray(ids, dtype=np.int32) for ids in rows], any(map(mentions_side, texts)))


def choose_captions(available: int, wanted: int, bits: np.random.PCG64) -> np.ndarray:
    """Which `wanted` of an image's `available` captions to show: (wanted,) int64 positions among them.

    As many as there are: all, in their order. Fewer wanted: a random selection without repetition. More wanted: all,
    then random repetitions.
    """
    assert available > 0
    if wanted < available:
        return np.argsort(bits.random_raw(available), kind="stable")[:wanted].astype(np.int64)
    repetitions = bits.random_raw(wanted - available) % np.uint64(available)
    return np.concatenate([np.arange(available), repetitions.astype(np.int64)])


def collate_captions(token_ids: Sequence[Sequence[int] | np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad captions at the end, to the longest of them.

    Returns token_ids (B, T) int64 and token_mask (B, T) bool, True where a token is real.
    """
    longest = max((len(ids) for ids in token_ids), default=0)
    result = np.full((len(token_ids), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(token_ids), longest), dtype=bool)
    for row, ids in enumerate(token_ids):
        result[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return torch.from_numpy(result), torch.from_numpy(mask)
