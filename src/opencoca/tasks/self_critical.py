"""Self-critical training: the network samples captions, and those that people's captions speak for become likelier.

Rennie et al. 2017 (arXiv 1612.00563), with CIDEr-D as the reward. Each sample is compared with the mean of the image's
other samples (Luo 2020, arXiv 2003.09971). The end of a caption counts as a word, or unfinished ones would pay.

Letters: I images, K samples of an image, Q image tokens, D width, S sampled words that have a next word.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opencoca.data import SampleSource
from opencoca.data.captions import collate_captions
from opencoca.evaluation.caption_metrics import CiderD, NgramCounts, ngram_counts
from opencoca.evaluation.caption_words import caption_tokens
from opencoca.generation import GenerationOptions, generate
from opencoca.generation.options import GeneratedCaption
from opencoca.model.coca import CoCa
from opencoca.tokenizer import Tokenizer
from opencoca.tokenizer.languages import texts_in

_END = "</caption>"  # no token of a caption: those hold no angle brackets
# Document frequencies are those of at most so many images, evenly spaced.
_MOST_DOCUMENTS = 100_000


class SampledWords(NamedTuple):
    """hidden (S, D): states; next_ids (S,): the word sampled after each; advantages (S,): of their captions."""

    hidden: Tensor
    next_ids: Tensor
    advantages: Tensor

    def loss(self, network: CoCa) -> Tensor:
        """The sum over captions of -advantage * log-probability, whose gradient is the expected reward's, negated."""
        logits = network.word_logits(self.hidden)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (self.advantages * F.cross_entropy(wide, self.next_ids, reduction="none")).sum()


class SelfCritic:
    """Samples captions of a training batch's images and says how good each is.

    num_samples: K, at least 2. max_new_tokens: of a sample, its end included.
    mean_reward: of the last batch's samples, in this process.
    """

    def __init__(self, source: SampleSource, tokenizer: Tokenizer, num_samples: int, max_new_tokens: int):
        """source: the training images and the captions that people wrote; those are read once."""
        self.source, self.tokenizer = source, tokenizer
        self.options = GenerationOptions(num_captions=num_samples, temperature=1.0, max_new_tokens=max_new_tokens)
        self._cider = CiderD(self._documents())
        self.mean_reward = 0.0

    def _documents(self) -> Iterator[Sequence[NgramCounts]]:
        count = len(self.source)
        for index in np.linspace(0, count - 1, min(count, _MOST_DOCUMENTS), dtype=int).tolist():
            if references := self._references(index):
                yield references

    def rewards(self, index: int, texts: Sequence[GeneratedCaption]) -> list[float]:
        """The CIDEr-D of captions of one training image; all 0 for an image that nobody described."""
        references = self._references(index)
        if not references:
            return [0.0] * len(texts)
        eos = self.tokenizer.eos_id
        return self._cider.scores([self._ngrams(text.text, text.token_ids[-1] == eos) for text in texts], references)

    def _references(self, index: int) -> list[NgramCounts]:
        """The captions of an image in the language that is sampled."""
        return [
            self._ngrams(caption, True) for caption in texts_in(self.source.captions(index), self.tokenizer.language)
        ]

    def _ngrams(self, caption: str, ends: bool) -> NgramCounts:
        return ngram_counts(caption_tokens(caption, self.tokenizer.language) + [_END] * ends)

    def sample(self, network: CoCa, features: Tensor, sample_ids: Tensor) -> SampledWords:
        """features (I, N, C) of the image encoder, of the training images sample_ids (I,).

        Without dropout while captions are drawn; the random numbers are those of torch's generator.
        """
        seed = int(torch.randint(2**31, ()))
        was_training = network.training
        network.eval()
        with torch.no_grad():
            seen = network.pool_features(features, contrastive=False).tokens
        assert seen is not None
        written = generate(
            network, seen, self.tokenizer, self.options, image_seeds=[seed + i for i in range(len(features))]
        )
        network.train(was_training)
        rewards = torch.tensor([self.rewards(*pair) for pair in zip(sample_ids.tolist(), written, strict=True)])
        self.mean_reward = float(rewards.mean())
        others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
        ids = [np.asarray(text.token_ids) for texts in written for text in texts]
        token_ids, token_mask = (part.to(features.device) for part in collate_captions(ids, self.tokenizer.pad_id))
        words, next_ids = network.word_states(token_ids, token_mask).with_next(token_ids[token_mask])
        tokens = network.pool_features(features, contrastive=False).tokens
        assert tokens is not None
        hidden = network.decode_packed(words, tokens)
        counts = token_mask.sum(dim=1) - 1
        advantages = (rewards - others).flatten().to(hidden.device).repeat_interleave(counts)
        return SampledWords(hidden, next_ids, advantages)
