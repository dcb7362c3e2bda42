"""Tokens equal the Java tokenizer's: a frozen table here, many more captions where Java is at hand."""

import json
import random
from pathlib import Path

import pytest
from caption_examples import HARD_CAPTIONS, SENTENCES, edited
from hypothesis import given
from hypothesis import strategies as st

from opencoca.evaluation.ptb_tokenizer import PUNCTUATION, ptb_tokenize

FACTS = json.loads(Path(__file__).with_name("caption_facts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("caption", "tokens"), FACTS["tokens"])
def test_tokens_equal_the_frozen_table(caption, tokens):
    assert ptb_tokenize(caption) == tokens


def test_the_frozen_table_covers_every_hard_caption():
    assert [caption for caption, _ in FACTS["tokens"]] == list(HARD_CAPTIONS)


@given(st.text(max_size=60))
def test_any_text_gives_lower_case_tokens_without_punctuation_and_spaces(caption):
    for token in ptb_tokenize(caption):
        assert token
        assert token not in PUNCTUATION
        assert " " not in token
        assert token == token.lower()


@given(st.lists(st.sampled_from(" ".join(SENTENCES).split()), max_size=12), st.sampled_from([" ", "  ", "\t", "\n"]))
def test_the_kind_of_white_space_does_not_matter(words, space):
    assert ptb_tokenize(space.join(words) + space) == ptb_tokenize(" ".join(words))


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyzABCDEFG ", max_size=60))
def test_plain_words_are_themselves(caption):
    if not {"cannot", "gonna", "gotta", "wanna", "lemme", "gimme"} & set(caption.lower().split()):
        assert ptb_tokenize(caption) == caption.lower().split()


def test_the_returned_list_may_be_changed():
    ptb_tokenize("a dog").append("changed")
    assert ptb_tokenize("a dog") == ["a", "dog"]


@pytest.mark.java
def test_tokens_equal_java_on_edited_captions(coco_peer):
    rng = random.Random(0)
    captions = [*HARD_CAPTIONS, *(edited(rng.choice(SENTENCES), rng) for _ in range(1000))]
    words = sorted({word for caption in captions for word in caption.split()})
    captions += [f"a {word} b" for word in words]
    differing = {
        caption: (theirs, ptb_tokenize(caption))
        for caption, theirs in zip(captions, coco_peer.peer_tokens(captions), strict=True)
        if theirs != ptb_tokenize(caption)
    }
    assert not differing
