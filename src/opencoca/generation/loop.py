"""Captions from image tokens, token by token with a key-value cache.

Letters: I images, Q image tokens, D width, R texts in work, T tokens so far, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opencoca.generation.logit_filters import LogitFilter, make_filters
from opencoca.generation.options import GeneratedCaption, GenerationOptions
from opencoca.generation.search import Greedy, Search
from opencoca.model.coca import CoCa, DecodingState
from opencoca.tokenizer import Tokenizer

# Dropping finished texts copies the caches of the others; below this share of them, computing on is cheaper.
_DROP_FROM_SHARE = 1 / 8


@torch.inference_mode()
def generate(
    model: CoCa, image_tokens: Tensor, tokenizer: Tokenizer, options: GenerationOptions | None = None
) -> list[GeneratedCaption]:
    """One greedy caption for each image of image_tokens (I, Q, D), as `CoCa.encode_image` gives them.

    A caption ends with the end token, after max_new_tokens, or where the model's context_length ends. It does not
    depend on the other images of the batch, and the batch's cost shrinks as captions end.

    Raises:
        ValueError: the model is in training mode, or the prefix leaves no room for a caption.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout spoils captions; call model.eval() first")
    options = options or GenerationOptions()
    prompt = _encode_prompt(tokenizer, options.prefix, model.config.text.context_length)
    max_length = min(len(prompt) + options.max_new_tokens, model.config.text.context_length)
    filters = make_filters(options, tokenizer, len(prompt), model.config.text.vocab_size)
    work = _Work.start(model, image_tokens, Greedy(), prompt, max_length)
    finished: dict[int, list[_Text]] = {}
    while work.images.numel():
        finished.update(work.advance(filters, tokenizer.eos_id, max_length))
    return [_as_caption(finished[image][0], tokenizer, len(prompt)) for image in range(image_tokens.shape[0])]


@dataclass(frozen=True)
class _Text:
    token_ids: list[int]
    log_probability: float


@dataclass
class _Work:
    """The texts in work: tokens (R, T), log-probabilities (R,), which have ended (R,), and whose they are, images (I,).

    pending (R, t): the tokens that the caches do not have yet.
    """

    model: CoCa
    search: Search
    state: DecodingState
    images: Tensor
    token_ids: Tensor
    totals: Tensor
    ended: Tensor
    pending: Tensor

    @classmethod
    def start(cls, model: CoCa, image_tokens: Tensor, search: Search, prompt: list[int], max_length: int) -> "_Work":
        device = image_tokens.device
        num_images = image_tokens.shape[0]
        num_texts = num_images * search.texts_per_image
        token_ids = torch.tensor(prompt, device=device).repeat(num_texts, 1)
        return cls(
            model=model,
            search=search,
            state=model.start_decoding(image_tokens, search.texts_per_image, capacity=max_length),
            images=torch.arange(num_images, device=device),
            token_ids=token_ids,
            totals=torch.zeros(num_texts, device=device),
            ended=torch.zeros(num_texts, dtype=torch.bool, device=device),
            pending=token_ids,
        )

    def advance(self, filters: list[LogitFilter], eos_id: int, max_length: int) -> dict[int, list[_Text]]:
        """Makes every text one token longer; returns the texts of images that leave the work, by image."""
        logits = self.model.decode_step(self.pending, self.state)
        # Half precision would round a long caption's sum.
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        allowed = log_probs.clone()
        for logit_filter in filters:
            logit_filter.apply(allowed, self.token_ids)
        parents, next_ids = self.search.extend(allowed, self.totals, self.ended)
        if self.search.texts_per_image > 1:
            self.state.select(parents)
        had_ended = self.ended[parents]
        next_ids = next_ids.where(~had_ended, eos_id)
        gained = log_probs[parents, next_ids].where(~had_ended, 0)
        self.token_ids = torch.cat((self.token_ids[parents], next_ids[:, None]), dim=1)
        self.totals = self.totals[parents] + gained
        self.ended = had_ended | (next_ids == eos_id)
        self.pending = next_ids[:, None]
        return self._drop_finished(eos_id, is_last=self.token_ids.shape[1] >= max_length)

    def _drop_finished(self, eos_id: int, is_last: bool) -> dict[int, list[_Text]]:
        per_image = self.search.texts_per_image
        done = self.ended.view(-1, per_image).all(dim=1) | is_last
        num_done = int(done.sum())
        if num_done == 0 or num_done < _DROP_FROM_SHARE * done.numel():
            return {}
        rows_done = done.repeat_interleave(per_image)
        ids, totals = self.token_ids[rows_done].tolist(), self.totals[rows_done].tolist()
        texts = [_Text(_up_to_first(row, eos_id), total) for row, total in zip(ids, totals, strict=True)]
        finished = {
            image: texts[index * per_image : (index + 1) * per_image]
            for index, image in enumerate(self.images[done].tolist())
        }
        self._keep((~rows_done).nonzero().squeeze(1), (~done).nonzero().squeeze(1))
        return finished

    def _keep(self, rows: Tensor, images: Tensor) -> None:
        self.images = self.images[images]
        self.token_ids, self.totals, self.ended = self.token_ids[rows], self.totals[rows], self.ended[rows]
        self.pending = self.pending[rows]
        if images.numel():
            self.state.select(rows, images)


def _encode_prompt(tokenizer: Tokenizer, prefix: str, context_length: int) -> list[int]:
    prompt = tokenizer.encode(prefix.rstrip())[:-1]
    if len(prompt) >= context_length:
        raise ValueError(
            f"the prefix {prefix[:40]!r} takes {len(prompt)} of the {context_length} tokens that the model can "
            "hold, which leaves none for a caption; use a shorter one"
        )
    return prompt


def _up_to_first(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids


def _as_caption(text: _Text, tokenizer: Tokenizer, prompt_length: int) -> GeneratedCaption:
    ids = text.token_ids
    return GeneratedCaption(tokenizer.decode(ids), tuple(ids), text.log_probability, len(ids) - prompt_length)
