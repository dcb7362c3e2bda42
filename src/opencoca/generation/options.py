"""Options of caption generation, and the captions that come of it: both are frozen dataclasses.

Letters: E embed_dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from opencoca.system.messages import shown
from opencoca.system.names import suggests_options

if TYPE_CHECKING:  # the command line makes its options of these classes, and need not wait for PyTorch
    from torch import Tensor

# More texts of one image than these fit no memory; cooler than this, logits divided by it leave what floats can hold.
_MOST_TEXTS, _LEAST_TEMPERATURE = 1000, 1e-4


@suggests_options
@dataclass(frozen=True)
class GenerationOptions:
    """How captions are generated: greedily, by beam search (num_beams), or by sampling (temperature, top_k, ...).

    max_new_tokens: the largest number of tokens after the prefix, the end token included.
    min_new_tokens: the least number of tokens before the end token.
    prefix: text that every caption begins with ("a photo of"); spaces at its end are dropped.
    num_captions: the number of captions for each image, best first; more than one need as many beams, or sampling.

    Beam search:
    num_beams: the number of texts that are continued side by side for each image; 1 is greedy search.
    length_penalty: candidates are ranked by log-probability / length ** length_penalty; above 0 favours long ones.
    early_stopping: when a search with num_beams finished candidates ends. true: at once; false: when no unfinished
        text has a better score at its present length; never: when none can still reach one (arXiv 2204.05424).
    num_groups: divides the beams into this many groups, which diversity_penalty keeps apart (arXiv 1610.02424); without
        a penalty all groups find the same captions.
    diversity_penalty: nats that a group loses for a token each time a group before it uses the same token at the same
        position.

    Sampling (any of the first four turns it on):
    temperature: divides the logits: below 1 is safer, above 1 wilder, 0 is greedy. None: 1 if sampling, else greedy.
    top_k: draws only from the k most probable tokens; 0 = all. Applied first.
    top_p: draws only from the most probable tokens that together reach this probability (arXiv 1904.09751); 1 = all.
    min_p: draws only from tokens with at least this share of the largest probability (arXiv 2407.01082); 0 = all.
    seed: another seed draws other captions; the same seed and image give the same ones, whatever else is in the batch.

    For all of them:
    repetition_penalty: multiplies the log-probability of tokens that the text has already (arXiv 1909.05858, section
        4.1); 1 = no penalty.
    no_repeat_ngram: the number of consecutive tokens that may not occur twice in a text; 0 = no limit.
    forbidden_words: words or phrases that no caption contains.
    required_words: words or phrases that every caption contains.

    Raises ValueError for values and combinations that cannot be met.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 0
    prefix: str = ""
    num_captions: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_groups: int = 1
    diversity_penalty: float = 0.0
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    forbidden_words: tuple[str, ...] = ()
    required_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("forbidden_words", "required_words"):
            object.__setattr__(self, name, _as_words(getattr(self, name), name))
        _check_ranges(self)
        _check_search(self)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        if self.temperature == 0:
            return False
        return self.temperature is not None or self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def groups_in_work(self) -> int:
        """The number of groups that are searched; without a penalty all find the same, so that one is enough."""
        return self.num_groups if self.diversity_penalty > 0 else 1

    @property
    def texts_in_work(self) -> int:
        """The number of texts that are computed side by side for each image."""
        if self.num_beams == 1:
            return self.num_captions
        return self.num_beams // self.num_groups * self.groups_in_work


class GenerationKeywords(TypedDict, total=False):
    """The fields of `GenerationOptions` but num_captions, as keyword arguments of other functions.

    Editors and type checkers read them here; `shows_generation_options` shows them to `help()`.
    """

    max_new_tokens: int
    min_new_tokens: int
    prefix: str
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_groups: int
    diversity_penalty: float
    temperature: float | None
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    no_repeat_ngram: int
    forbidden_words: Iterable[str]
    required_words: Iterable[str]


_Function = TypeVar("_Function", bound=Callable[..., Any])


def shows_generation_options(function: _Function) -> _Function:
    """Makes `help()` list every option with its type and default instead of a function's ``**keywords``.

    An option that does not exist is a TypeError that names the nearest one.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = {parameter.name for parameter in own}
    options = inspect.signature(GenerationOptions, eval_str=True).parameters.values()
    shown = [p.replace(kind=p.KEYWORD_ONLY) for p in options if p.name not in names]
    function.__signature__ = signature.replace(parameters=[*own, *shown])  # pyright: ignore[reportFunctionMemberAccess]
    return suggests_options(function)


@dataclass(frozen=True)
class GeneratedCaption:
    """One caption.

    text: the caption, prefix included.
    token_ids: all of it: start token, prefix, generated tokens, and the end token unless the caption was cut.
    log_probability: natural logarithm of the probability that the model gives to the generated tokens after image
        and prefix; nothing that was forbidden or penalised meanwhile changes it.
    length: number of generated tokens, the end token included; log_probability / length is their mean.
    score: what an image's captions are ranked by: log_probability / length ** length_penalty; in beam search less what
        repetition_penalty and diversity_penalty took off.
    similarity: cosine of the caption's and the image's embedding, -1 to 1, where captions were reranked by it or have a
        confidence.
    confidence: probability, 0 to 1, that a person calls the caption right; None if the model's folder has no
        calibration (see `opencoca.generation.confidence`).
    text_embed: (E,) of length 1, float32, on the CPU: the embedding of these tokens, closed by an end token, if it
        was asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probability: float
    length: int
    score: float = 0.0
    similarity: float | None = None
    confidence: float | None = None
    text_embed: Tensor | None = field(default=None, compare=False, repr=False)


def _check_ranges(options: GenerationOptions) -> None:
    infinity, temperature = float("inf"), options.temperature
    coolest = f"choose 0 (greedy), or {_LEAST_TEMPERATURE} or more, such as 0.7"
    for name, least in (("num_captions", 1), ("num_beams", 1), ("num_groups", 1), ("top_k", 0), ("no_repeat_ngram", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be {least} or more")
    for name in ("num_captions", "num_beams"):
        if getattr(options, name) > _MOST_TEXTS:
            raise ValueError(f"{name} is {shown(getattr(options, name), 40)}; it must be {_MOST_TEXTS:,} or less")
    longest = options.max_new_tokens
    for name, is_possible, wanted in (
        ("max_new_tokens", longest >= 1, "a caption needs at least 1"),
        ("min_new_tokens", 0 <= options.min_new_tokens <= longest, f"choose 0 to max_new_tokens, which is {longest}"),
        ("temperature", not temperature or _LEAST_TEMPERATURE <= temperature < infinity, coolest),
        ("length_penalty", abs(options.length_penalty) < infinity, "choose a finite number, such as 1"),
        ("top_p", 0 < options.top_p <= 1, "choose more than 0 and at most 1, such as 0.9"),
        ("min_p", 0 <= options.min_p <= 1, "choose 0 to 1, such as 0.05"),
        ("repetition_penalty", 0 < options.repetition_penalty < infinity, "choose 1 for none or more, such as 1.2"),
        ("diversity_penalty", 0 <= options.diversity_penalty < infinity, "choose 0 or more, such as 0.5"),
        ("early_stopping", options.early_stopping in (True, False, "never"), "choose True, False or 'never'"),
    ):
        if not is_possible:
            raise ValueError(f"{name} is {getattr(options, name)!r}; {wanted}")


def _check_search(options: GenerationOptions) -> None:
    beams, groups = options.num_beams, options.num_groups
    if options.temperature == 0 and (options.top_k or options.top_p < 1 or options.min_p):
        raise ValueError("temperature 0 is greedy, which top_k, top_p and min_p cannot change; leave one or other out")
    if options.samples and beams > 1:
        raise ValueError(
            f"num_beams {beams} searches while temperature, top_k, top_p and min_p sample; leave one or other out"
        )
    if beams % groups:
        raise ValueError(f"num_groups {groups} must divide num_beams, which is {beams}")
    if options.diversity_penalty and groups == 1:
        raise ValueError("diversity_penalty acts between groups of beams; set num_groups to 2 or more")
    if not options.samples and options.num_captions > beams:
        raise ValueError(
            f"num_captions is {options.num_captions}, but this search finds {beams}; set num_beams to "
            f"{options.num_captions} or more, or sample with temperature=1.0 or top_p=0.9"
        )
    if both := {word.lower() for word in options.forbidden_words} & {word.lower() for word in options.required_words}:
        raise ValueError(f"{min(both)!r} is both in forbidden_words and in required_words; take it out of one")


def _as_words(words: Iterable[object], name: str) -> tuple[str, ...]:
    if isinstance(words, str):
        raise ValueError(f"{name} is the single text {words!r}; put it in a list")
    found: list[str] = []
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"{name} has {word!r}, which is no word")
        found.append(word)
    return tuple(found)


def with_keywords(
    options: GenerationOptions | None, num_captions: int | None, keywords: GenerationKeywords
) -> GenerationOptions:
    """The options with the fields replaced that were given as keywords."""
    changes = dict(keywords) if num_captions is None else {**keywords, "num_captions": num_captions}
    return replace(options or GenerationOptions(), **changes)
