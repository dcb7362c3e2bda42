"""Confidence: a probability that rises with both scores, kept in a model's info, None where there is no calibration."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cli_helpers import save_tiny_model
from opencoca.cli import main
from opencoca.generation.confidence import CALIBRATION, CaptionCalibration
from opencoca.inference.loading import load
from opencoca.inference.pipeline import Pipeline

NUMBERS = CaptionCalibration(bias=1.0, log_probability_weight=0.5, similarity_weight=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("confidence") / "model")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.new("RGB", (20, 16), (80 * number, 90, 200 - 60 * number)).save(folder / f"{number}.png")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def calibrated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a calibration."""
    pipeline = load(folder, device="cpu")
    pipeline.info = {"step": 3, **NUMBERS.to_info()}
    return pipeline.save(tmp_path_factory.mktemp("confidence") / "calibrated")


@given(st.floats(-30, 0), st.floats(-30, 0), st.floats(-1, 1), st.floats(-1, 1))
def test_confidence_is_a_probability_that_rises_with_both_scores(a: float, b: float, c: float, d: float) -> None:
    lower, higher = NUMBERS(min(a, b), min(c, d)), NUMBERS(max(a, b), max(c, d))
    assert 0 <= lower <= higher <= 1
    logit = torch.tensor(1.0 + 0.5 * a + 2.0 * c, dtype=torch.float64)
    assert NUMBERS(a, c) == pytest.approx(logit.sigmoid().item(), abs=1e-12)


def test_extreme_scores_overflow_nothing() -> None:
    assert CaptionCalibration(0.0, 1e6, 0.0)(-1e6, 0.0) == 0.0
    assert CaptionCalibration(0.0, -1e6, 0.0)(-1e6, 0.0) == 1.0


def test_a_folder_keeps_its_calibration(folder: Path, calibrated: Path) -> None:
    assert load(folder, device="cpu").calibration is None
    pipeline = load(calibrated, device="cpu")
    assert pipeline.calibration == NUMBERS
    assert pipeline.info["step"] == 3


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_captions": 2}, {"num_beams": 3, "rerank": True}])
def test_captions_are_the_same_but_for_their_confidence(
    folder: Path, calibrated: Path, photos: list[str], options: dict
) -> None:
    plain = load(folder, device="cpu").caption_details(photos, max_new_tokens=8, **options)
    pipeline = load(calibrated, device="cpu")
    rated = pipeline.caption_details(photos, max_new_tokens=8, **options)
    embeds = pipeline.embed_images(photos)
    for own, expected, embed in zip(rated, plain, embeds, strict=True):
        for caption, without in zip(own, expected, strict=True):
            assert without.confidence is None
            assert replace(caption, similarity=without.similarity, confidence=None) == without
            assert caption.text_embed is not None
            similarity = (caption.text_embed @ embed).item()
            assert caption.similarity == pytest.approx(similarity, abs=1e-6)
            expected_confidence = NUMBERS(caption.log_probability / caption.length, similarity)
            assert caption.confidence == pytest.approx(expected_confidence, abs=1e-6)


def test_the_command_line_prints_confidence(
    folder: Path, calibrated: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    details = load(calibrated, device="cpu").caption_details(photos)
    assert main(["caption", *photos, "--model", str(calibrated), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["confidence"] for row in rows] == pytest.approx([own[0].confidence for own in details], abs=1e-4)
    out = tmp_path / "captions.csv"
    assert main(["caption", *photos, "--model", str(calibrated), "--out", str(out)]) == 0
    assert '"confidence"' in out.read_text().splitlines()[0]
    assert main(["caption", *photos, "--model", str(folder), "--json"]) == 0
    assert "confidence" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    "stored",
    [
        5,
        {},
        {"bias": 1.0},
        {**NUMBERS.to_info()[CALIBRATION], "more": 1.0},
        {**NUMBERS.to_info()[CALIBRATION], "bias": "1"},
        {**NUMBERS.to_info()[CALIBRATION], "bias": True},
        {**NUMBERS.to_info()[CALIBRATION], "similarity_weight": float("nan")},
    ],
)
def test_a_damaged_calibration_is_refused(folder: Path, stored: object) -> None:
    good = load(folder, device="cpu")
    with pytest.raises(ValueError, match=CALIBRATION):
        Pipeline(good.model, good.tokenizer, good.preprocess, {CALIBRATION: stored})
