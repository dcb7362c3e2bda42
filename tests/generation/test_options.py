"""Options that cannot be met are refused, with what to change."""

from collections.abc import Iterable
from typing import get_type_hints

import pytest

from opencoca.generation import GenerationOptions
from opencoca.generation.options import GenerationKeywords


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens is 6"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_captions": 3}, "set num_beams to 3 or more, or sample"),
        ({"num_beams": 2, "num_captions": 3}, "finds 2"),
        ({"num_beams": 4, "num_groups": 3}, "must divide num_beams"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "set num_groups"),
        ({"num_beams": 4, "diversity_penalty": -1.0, "num_groups": 2}, "diversity_penalty is -1"),
        ({"num_beams": 2, "temperature": 0.7}, "leave one or other out"),
        ({"num_beams": 2, "top_p": 0.7}, "leave one or other out"),
        ({"temperature": 0, "top_k": 5}, "temperature 0 is greedy"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-320}, "temperature is 1e-320"),
        ({"length_penalty": float("inf")}, "length_penalty is inf"),
        ({"num_beams": 10**20}, "must be 1,000 or less"),
        ({"num_captions": 1001, "temperature": 1.0}, "num_captions is 1001; it must be 1,000 or less"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"forbidden_words": "cat"}, "put it in a list"),
        ({"forbidden_words": ("cat", " ")}, "which is no word"),
        ({"forbidden_words": ("Cat",), "required_words": ("cat",)}, "both in forbidden_words and in required_words"),
    ],
    ids=str,
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, False),
        ({"num_beams": 4}, False),
        ({"temperature": 0}, False),
        ({"seed": 5}, False),
        ({"temperature": 1.0}, True),
        ({"top_k": 3}, True),
        ({"top_p": 0.9}, True),
        ({"min_p": 0.1}, True),
    ],
    ids=str,
)
def test_what_makes_it_sample(options, samples):
    assert GenerationOptions(**options).samples is samples


def test_words_may_be_given_as_a_list():
    assert GenerationOptions(forbidden_words=["cat"]) == GenerationOptions(forbidden_words=("cat",))


def test_keywords_are_the_fields_of_the_options() -> None:
    fields = get_type_hints(GenerationOptions)
    keywords = get_type_hints(GenerationKeywords)
    assert list(keywords) == [name for name in fields if name != "num_captions"]
    for name, kind in keywords.items():  # a list of words is as good as a tuple
        assert fields[name] == (tuple[str, ...] if kind == Iterable[str] else kind), name
