"""The batch that a budget allows."""

import pytest
import torch

from opencoca.inference.pipeline import Pipeline
from opencoca.recaption.memory import (
    _PeakMemory,
    choose_batch_size,
    free_bytes,
    measure_bytes_per_image,
    parse_bytes,
)

from .helpers import make_captioner


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4e9),
        ("4 gb", 4e9),
        ("512MiB", 512 * 2**20),
        ("1.5g", 1.5e9),
        ("800K", 8e5),
        ("1e9", 1e9),
        ("100", 100),
        ("2TiB", 2**41),
    ],
)
def test_amounts_of_memory(text: str, expected: float) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "GB", "4 GBs", "-1GB", "1.2.3GB", "four", "."])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match="is no amount of memory"):
        parse_bytes(text)


@torch.inference_mode()
def test_peak_counts_what_lives_at_the_same_time() -> None:
    kilobyte = torch.ones(256)
    with _PeakMemory() as memory:
        first = kilobyte.repeat(10)
        second = first.repeat(2)[:1]  # a view keeps all of it
        del first
        third = second.expand(2560).clone()
        del second
        fourth = third.repeat(2)
    assert memory.peak == 1024 * (10 + 20)
    assert memory.total == 1024 * (10 + 20)
    del third, fourth


def test_bytes_per_image_grow_with_the_work(pipeline: Pipeline) -> None:
    greedy = measure_bytes_per_image(make_captioner(pipeline))
    beams = measure_bytes_per_image(make_captioner(pipeline, num_beams=6))
    height, width = pipeline.preprocess.config.image_size
    assert greedy > 10 * 3 * height * width
    assert beams > 1.5 * greedy


@pytest.mark.parametrize(("images", "expected"), [(1, 1), (2, 2), (3, 2), (7, 4), (8, 8), (1000, 32)])
def test_the_largest_power_of_two_that_fits(pipeline: Pipeline, images: int, expected: int) -> None:
    captioner = make_captioner(pipeline)
    one = measure_bytes_per_image(captioner)
    assert choose_batch_size(captioner, 10**6, images * one + one // 2) == expected


def test_never_more_than_there_are_images_and_never_none(pipeline: Pipeline) -> None:
    captioner = make_captioner(pipeline)
    assert choose_batch_size(captioner, 5, 10**12) == 4
    assert choose_batch_size(captioner, 0, 10**12) == 1
    assert choose_batch_size(captioner, 100, 1) == 1


def test_free_memory_is_a_part_of_the_machine() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
