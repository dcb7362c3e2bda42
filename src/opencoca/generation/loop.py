"""Captions from image tokens, token by token with a key-value cache.

Letters: I images, Q image tokens, D width, R texts in work, T tokens so far, V vocabulary, N cache entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opencoca.generation.beam_search import BeamSearch
from opencoca.generation.decoding.session import DecodingSession, Room
from opencoca.generation.decoding.state import DecodingState
from opencoca.generation.decoding.text_embed import embed_decoded
from opencoca.generation.logit_filters import LogitFilter, make_filters
from opencoca.generation.options import GeneratedCaption, GenerationOptions
from opencoca.generation.search import Candidate, Limits, SingleTexts
from opencoca.model.coca import CoCa
from opencoca.tokenizer import Tokenizer

# Texts at a time on a CPU: more of them are no faster, and their keys and values take memory.
_TEXTS_AT_A_TIME_ON_CPU = 128

# Dropping finished images copies the caches of the others; below this share of them, computing on is cheaper.
_DROP_FROM_SHARE = 1 / 8
# Recorded steps are of a power of two of images.
_DROP_FROM_SHARE_OF_GRAPHS = 1 / 2


@torch.inference_mode()
def generate(
    model: CoCa,
    image_tokens: Tensor,
    tokenizer: Tokenizer,
    options: GenerationOptions | None = None,
    *,
    image_seeds: Sequence[int] | None = None,
    with_text_embed: bool = False,
    session: DecodingSession | None = None,
) -> list[tuple[GeneratedCaption, ...]]:
    """For each image of image_tokens (I, Q, D), as `CoCa.encode_image` gives them, its captions, the best first.

    A caption ends with the end token, after max_new_tokens, or where the model's context_length ends. It does not
    depend on the other images of the batch, and the batch's cost shrinks as captions end.

    Args:
        image_seeds: one number for each image; sampling depends on `options.seed` and on it, not on where the image
            stands. Default: 0 to I - 1. `seeds_of_images` makes them from the pixels.
        with_text_embed: captions come with their text embedding, from the unimodal states that are there already.
        session: what earlier calls have made ready for this model; default: one for this call alone.

    Raises:
        ValueError: the model is in training mode, the prefix leaves no room for a caption, the required words do not
            fit, image_seeds is not as long as there are images, or the session is another model's.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout spoils captions; call model.eval() first")
    num_images = image_tokens.shape[0]
    if image_seeds is not None and len(image_seeds) != num_images:
        raise ValueError(f"there are {len(image_seeds)} image_seeds for {num_images} images; give one for each")
    options = options or GenerationOptions()
    prompt = _encode_prompt(tokenizer, options.prefix, model.config.text.context_length)
    limits = Limits(
        prompt_length=len(prompt),
        max_length=min(len(prompt) + options.max_new_tokens, model.config.text.context_length),
        eos_id=tokenizer.eos_id,
    )
    filters = make_filters(options, tokenizer, limits, model.config.text.vocab_size, image_tokens.device)
    session = session or DecodingSession(model)
    if session.model is not model:
        raise ValueError("the session was made for another model; make one with DecodingSession(model)")
    job = _Job(session, tokenizer, options, limits, prompt, filters, with_text_embed)
    seeds = torch.arange(num_images) if image_seeds is None else torch.tensor(image_seeds, dtype=torch.int64)
    at_a_time = max(1, num_images)
    if image_tokens.device.type == "cpu":
        at_a_time = max(1, _TEXTS_AT_A_TIME_ON_CPU // options.texts_in_work)
    parts = [slice(start, start + at_a_time) for start in range(0, num_images, at_a_time)]
    return [captions for part in parts for captions in _search(job, image_tokens[part], seeds[part])]


@dataclass(frozen=True)
class _Job:
    """What is done with images, whichever they are."""

    session: DecodingSession
    tokenizer: Tokenizer
    options: GenerationOptions
    limits: Limits
    prompt: list[int]
    filters: Sequence[LogitFilter]
    with_text_embed: bool


def _search(job: _Job, image_tokens: Tensor, image_seeds: Tensor) -> list[tuple[GeneratedCaption, ...]]:
    """The captions of each image; a function of its own, so that its caches are gone when the next ones are made."""
    options, limits, device = job.options, job.limits, image_tokens.device
    prompts = torch.tensor(job.prompt, device=device).repeat(image_tokens.shape[0], 1)
    room = Room(limits.max_length, options.texts_in_work, options.num_beams > 1, limits.prompt_length)
    if options.num_beams > 1:
        search = BeamSearch(options, limits, prompts, room.entries)
    else:
        search = SingleTexts(options, limits, prompts, image_seeds)
    with job.session.search(image_tokens, room) as state:
        work = _Work(job, state, search, torch.arange(image_tokens.shape[0], device=device), {})
        work.run()
    return [captions for _, captions in sorted(work.finished.items())]


@dataclass
class _Work:
    """The images in work (I,), by their numbers; the search over their texts; the caches that it reads.

    finished: the captions of each image that has left the work.
    """

    job: _Job
    state: DecodingState
    search: SingleTexts | BeamSearch
    images: Tensor
    finished: dict[int, tuple[GeneratedCaption, ...]]

    def run(self) -> None:
        """Makes every text one token longer, again and again, until no image is left."""
        job, search, state = self.job, self.search, self.state
        only_forbids = job.options.repetition_penalty == 1  # else a filter changes probabilities of allowed tokens, too
        next_ids = search.token_ids
        while self.images.numel():
            starts = state.num_words == 0
            logits = job.session.step(next_ids, state)
            # In float32 at least: half precision would round a caption's sum. On a CPU in place: getting memory of this
            # size anew in every step takes longer than the softmax.
            dtype = torch.promote_types(logits.dtype, torch.float32)
            wide = logits.to(dtype) if logits.is_cpu else None
            log_probs = torch.log_softmax(logits if wide is None else wide, -1, dtype, out=wide)
            allowed = log_probs if only_forbids else log_probs.clone()
            for logit_filter in job.filters:
                logit_filter(allowed, search.token_ids)
            parents = search.extend(allowed, log_probs, state.entries_of_texts() if search.shares_cache else None)
            if starts:
                self._make_rows(parents)
            elif search.shares_cache:
                state.reorder(parents)
            done = search.done | (search.token_ids.shape[1] >= job.limits.max_length)
            share = int(done.sum()) / done.numel()
            if share and share >= (_DROP_FROM_SHARE_OF_GRAPHS if state.recorded else _DROP_FROM_SHARE):
                self._drop(done)
            next_ids = search.token_ids[:, -1:]

    def _make_rows(self, parents: Tensor) -> None:
        """Makes rows for the texts (R,) that go on from the prompts."""
        if self.search.shares_cache:
            self.state.share_rows(self.search.texts_per_image)
            return
        if self.search.texts_per_image > 1:
            self.state.select(parents)
        if self.state.recorded:
            self.state.share_rows(1)

    def _drop(self, done: Tensor) -> None:
        """Takes the images that are done (I,) out of the work, and makes captions of their texts."""
        leaving, staying = done.nonzero().squeeze(1), (~done).nonzero().squeeze(1)
        results = [found[: self.job.options.num_captions] for found in self.search.results(leaving)]
        embeds = self._embed(leaving, results) if self.job.with_text_embed else [[None] * len(one) for one in results]
        for image, found, vectors in zip(self.images[leaving].tolist(), results, embeds, strict=True):
            pairs = zip(found, vectors, strict=True)
            self.finished[image] = tuple(self._as_caption(text, vector) for text, vector in pairs)
        self.images = self.images[staying]
        if staying.numel():
            self.search.keep(staying)
            per_image = self.state.rows_per_image
            rows = (staying[:, None] * per_image + torch.arange(per_image, device=staying.device)).flatten()
            self.state.select(rows, staying)

    def _embed(self, leaving: Tensor, results: list[list[Candidate]]) -> list[list[Tensor]]:
        """The text embedding (E,) of each candidate of the images that leave."""
        if self.search.shares_cache:
            rows, per_row = leaving, max(map(len, results))
            # Every row must have as many texts; some are embedded twice.
            texts = [(found * per_row)[index] for found in results for index in range(per_row)]
        else:
            per_row, texts = 1, [candidate for found in results for candidate in found]
            rows = torch.tensor([candidate.row for candidate in texts], device=leaving.device)
        seen = torch.stack([text.visible for text in texts]).unflatten(0, (-1, per_row))
        ids = [text.token_ids for text in texts]
        vectors = embed_decoded(self.job.session.model, self.state, rows, seen, ids, self.job.limits.eos_id)
        vectors = iter(vectors.flatten(0, 1).float().cpu())
        if not self.search.shares_cache:
            return [[next(vectors) for _ in found] for found in results]
        return [[next(vectors) for _ in range(per_row)][: len(found)] for found in results]

    def _as_caption(self, text: Candidate, text_embed: Tensor | None) -> GeneratedCaption:
        return GeneratedCaption(
            text=self.job.tokenizer.decode(text.token_ids),
            token_ids=tuple(text.token_ids),
            log_probability=text.log_probability,
            length=len(text.token_ids) - self.job.limits.prompt_length,
            score=text.score,
            text_embed=text_embed,
        )


def _encode_prompt(tokenizer: Tokenizer, prefix: str, context_length: int) -> list[int]:
    prompt = tokenizer.encode(prefix.rstrip())[:-1]
    if len(prompt) >= context_length:
        raise ValueError(
            f"the prefix {prefix[:40]!r} takes {len(prompt)} of the {context_length} tokens that the model can "
            "hold, which leaves none for a caption; use a shorter one"
        )
    return prompt
