"""Suspicious captions are flagged, ordinary ones are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoca.recaption.flags import COMMON, NEAR_EMPTY, REPETITION, CommonCaptions, FlagThresholds, caption_flags

ORDINARY = [
    "a dog runs over the grass",
    "two dogs",
    "a black dog and a white dog and a brown dog play",
    "a man in a red shirt is holding a red and black and white sign",
    "it's a boy 's hat",
    "一只狗在草地上奔跑",
    "ein Hund läuft über die Wiese",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_captions_have_no_flags(text: str) -> None:
    assert caption_flags(text) == ()


@pytest.mark.parametrize("text", ["", " ", ".", "dog", "Dog !", "...", "狗"])
def test_near_empty(text: str) -> None:
    assert caption_flags(text) == (NEAR_EMPTY,)


def test_the_prefix_does_not_count() -> None:
    assert caption_flags("a photo of", "a photo of") == (NEAR_EMPTY,)
    assert caption_flags("a photo of dogs", "a photo of") == (NEAR_EMPTY,)
    assert caption_flags("a photo of two dogs", "a photo of") == ()


@pytest.mark.parametrize(
    "text",
    [
        "a very very very large sky",
        "a man with a hat with a hat with a hat",
        "a dog, a dog, A dog",
        "狗狗狗在草地上",
        "on the street in the city on the street in the city on the street in the city",
        "the man and the man in the man and the man in the man and a man",
    ],
)
def test_repetition(text: str) -> None:
    assert caption_flags(text) == (REPETITION,)


@given(
    run=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8),
    before=st.lists(st.sampled_from("xyz"), max_size=5),
    times=st.integers(3, 6),
)
def test_any_run_of_words_three_times_in_a_row(run: list[str], before: list[str], times: int) -> None:
    assert REPETITION in caption_flags(" ".join([*before, *(run * times), "end"]))


@given(st.lists(st.integers(0, 10**6).map(lambda number: f"w{number}"), min_size=2, unique=True))
def test_different_words_are_never_a_repetition(words: list[str]) -> None:
    assert caption_flags(" ".join(words)) == ()


def test_common_captions_by_share_and_number() -> None:
    common = CommonCaptions(FlagThresholds(common_share=0.1, common_images=5))
    for number in range(100):
        common.add([f"picture number {number}"] if number % 10 else ["A dog runs.", "the dog runs"])
    assert common.is_common("dog runs!")
    assert common.is_common("Runs, a dog")
    assert not common.is_common("picture number 3")
    for number in range(100, 140):
        common.add([f"picture number {number}"])
    assert not common.is_common("a dog runs")


def test_few_images_have_no_common_caption() -> None:
    common = CommonCaptions()
    for _ in range(9):
        common.add(["a dog runs"])
    assert not common.is_common("a dog runs")
    common.add(["a dog runs"])
    assert common.is_common("a dog runs")
    assert COMMON == "common"
