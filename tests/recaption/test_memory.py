"""The batch that a budget allows."""

from dataclasses import replace

import pytest
import torch

from opencoca.data import PreprocessConfig
from opencoca.inference.pipeline import Pipeline
from opencoca.inference.preprocess import Preprocess
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.recaption.memory import bytes_per_image, choose_batch_size, free_bytes, parse_bytes

from .helpers import make_captioner
from .peak_memory import PeakMemory, measured_bytes_per_image


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
    with PeakMemory() as memory:
        first = kilobyte.repeat(10)
        second = first.repeat(2)[:1]  # a view keeps all of it
        del first
        third = second.expand(2560).clone()
        del second
        fourth = third.repeat(2)
    assert memory.peak == 1024 * (10 + 20)
    assert memory.total == 1024 * (10 + 20)
    del third, fourth


@pytest.mark.parametrize(
    ("encoder", "size", "options"),
    [
        ("vit", 96, {}),
        ("efficientnet_lite0", 96, {}),
        # Small images: decoding needs more than the encoder.
        ("vit", 16, {}),
        ("vit", 16, {"temperature": 0.9}),
        ("vit", 16, {"repetition_penalty": 1.2, "no_repeat_ngram": 2}),
    ],
)
def test_what_shapes_say_is_enough_and_not_wasteful(
    pipeline: Pipeline, encoder: str, size: int, options: dict[str, object]
) -> None:
    image = ImageEncoderConfig(encoder, (size, size), patch_size=8, width=64, depth=2, num_heads=4, mlp_width=256)
    text = TextConfig(3000, context_length=24, width=64, unimodal_depth=2, multimodal_depth=2, num_heads=4)
    config = CoCaConfig(embed_dim=32, image=image, pooler=PoolerConfig(num_queries=16, num_heads=4), text=text)
    model = Pipeline(CoCa(config), pipeline.tokenizer, Preprocess(PreprocessConfig((size, size))))
    captioner = make_captioner(model, **options)
    measured = measured_bytes_per_image(captioner)
    assert measured <= bytes_per_image(captioner) <= 5 * measured


def test_bytes_per_image_grow_with_beams_and_candidates(pipeline: Pipeline) -> None:
    greedy, beams = (bytes_per_image(make_captioner(pipeline, num_beams=number)) for number in (1, 6))
    assert beams > 1.5 * greedy
    sampled = make_captioner(pipeline, temperature=1.0)
    assert bytes_per_image(replace(sampled, rerank=0.5)) > 1.5 * bytes_per_image(sampled)


def test_nothing_is_captioned_to_choose(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "caption_pixels", lambda *_, **__: pytest.fail("an image was captioned"))
    assert choose_batch_size(make_captioner(pipeline), 10**6, 10**12) == 32


@pytest.mark.parametrize(("images", "expected"), [(1, 1), (2, 2), (3, 2), (7, 4), (8, 8), (1000, 32)])
def test_the_largest_power_of_two_that_fits(pipeline: Pipeline, images: int, expected: int) -> None:
    captioner = make_captioner(pipeline)
    one = bytes_per_image(captioner)
    assert choose_batch_size(captioner, 10**6, images * one + one // 2) == expected


def test_never_more_than_there_are_images_and_never_none(pipeline: Pipeline) -> None:
    captioner = make_captioner(pipeline)
    assert choose_batch_size(captioner, 5, 10**12) == 4
    assert choose_batch_size(captioner, 0, 10**12) == 1
    assert choose_batch_size(captioner, 100, 1) == 1


def test_free_memory_is_a_part_of_the_machine() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
