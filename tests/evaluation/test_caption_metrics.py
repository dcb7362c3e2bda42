"""BLEU, ROUGE-L and CIDEr-D equal pycocoevalcap's: frozen scores here, fresh ones where Java is at hand."""

import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from caption_examples import SENTENCES, example_captions
from hypothesis import given
from hypothesis import strategies as st

from opencoca.evaluation.caption_metrics import _longest_common_subsequence, caption_scores

FACTS = json.loads(Path(__file__).with_name("caption_facts.json").read_text(encoding="utf-8"))
NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")


def assert_scores_equal(scores, expected):
    for name in NAMES:
        assert getattr(scores, name) == pytest.approx(expected[name], abs=1e-9), name
    assert dict(scores.cider_d_of_image) == pytest.approx(expected["cider_d_of_image"], abs=1e-9)


@pytest.mark.parametrize("fact", FACTS["sets"], ids=range(len(FACTS["sets"])))
def test_scores_equal_the_frozen_table(fact):
    scores = caption_scores(fact["candidates"], fact["references"])
    assert_scores_equal(scores, fact["scores"])
    assert scores.num_images == len(fact["candidates"])


@pytest.mark.java
def test_scores_equal_pycocoevalcap(coco_peer):
    for seed, num_images in ((2, 300), (3, 2)):
        candidates, references = example_captions(num_images, seed)
        assert_scores_equal(caption_scores(candidates, references), coco_peer.peer_scores(candidates, references))


def test_perfect_captions_score_the_maximum():
    captions = dict(enumerate(SENTENCES))
    scores = caption_scores(captions, {key: [caption] for key, caption in captions.items()})
    assert [getattr(scores, name) for name in NAMES] == pytest.approx([1, 1, 1, 1, 1, 10])


def test_captions_without_a_common_word_score_nothing():
    scores = caption_scores({1: "a dog", 2: "a cat"}, {1: ["two horses"], 2: ["some birds"]})
    assert [getattr(scores, name) for name in NAMES] == pytest.approx([0] * 6, abs=1e-5)


@given(st.integers(0, 10_000))
def test_scores_depend_on_no_order_and_no_names(seed):
    candidates, references = example_captions(8, seed)
    rng = random.Random(seed)
    keys = rng.sample(list(candidates), len(candidates))
    shuffled = caption_scores(
        {(key, 0): candidates[key] for key in keys},
        {(key, 0): rng.sample(references[key], len(references[key])) for key in reversed(keys)},
    )
    scores = caption_scores(candidates, references)
    for name in NAMES:
        assert getattr(shuffled, name) == pytest.approx(getattr(scores, name), rel=1e-12)
    for key in keys:
        assert shuffled.cider_d_of_image[(key, 0)] == pytest.approx(scores.cider_d_of_image[key], rel=1e-12)


@given(st.text("abc", max_size=12), st.text("abcd", max_size=12))
def test_longest_common_subsequence_equals_the_table(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert _longest_common_subsequence(first, second) == table[-1][-1]


def test_the_mean_of_the_images_is_the_score():
    scores = caption_scores(*example_captions(20, seed=5))
    assert math.fsum(scores.cider_d_of_image.values()) / 20 == pytest.approx(scores.cider_d)
    assert set(asdict(scores)) == {*NAMES, "num_images", "cider_d_of_image"}


def test_two_thousand_images_take_seconds():
    candidates, references = example_captions(2000, seed=6)
    start = time.process_time()
    caption_scores(candidates, references)
    assert time.process_time() - start < 12  # about 2 on a free core; a quadratic step would take minutes


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({}, {}, "no captions to score"),
        ({"a.jpg": "x"}, {}, r"1 images are missing from the references \('a.jpg'\)"),
        (
            {"a": "x"},
            {key: ["x"] for key in "abcde"},
            r"4 images are missing from the candidates \('b', 'c', 'd', ...\)",
        ),
        ({"a": "x", "b": "y"}, {"a": ["x"], "b": []}, r"1 images have no reference caption \('b'\)"),
        ({"a": ["x"]}, {"a": ["x"]}, "caption of image 'a'.*one string"),
        ({"a": "x"}, {"a": "x"}, "references of image 'a'.*list of strings"),
    ],
)
def test_captions_that_do_not_fit_are_refused(candidates, references, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(candidates, references)
