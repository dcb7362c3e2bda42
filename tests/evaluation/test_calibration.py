"""The fit of confidence to judged captions, its table of reliability, and the script that runs both."""

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from cli_helpers import save_tiny_model
from opencoca.evaluation.calibration import caption_scores, fit_calibration, held_out_confidences, reliability
from opencoca.generation.confidence import CaptionCalibration
from opencoca.inference.loading import load

SCRIPT = Path(__file__).parents[2] / "scripts" / "calibrate_captions.py"
TRUE = CaptionCalibration(bias=2.0, log_probability_weight=1.5, similarity_weight=4.0)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibrate_captions", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("calibration") / "model")


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(10)]
    for number, path in enumerate(paths):
        Image.new("RGB", (20, 16), (25 * number, 90, 200 - 20 * number)).save(path)
    return paths


def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of captions, and judgements that are right as often as TRUE says."""
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([-4.0, 1.0])
    chances = torch.tensor([TRUE(*pair) for pair in scores.tolist()])
    return scores, (torch.rand(count, generator=generator) < chances).long()


def test_the_fit_finds_the_numbers_that_judgements_were_drawn_with() -> None:
    found = fit_calibration(*drawn(20_000))
    assert found.bias == pytest.approx(TRUE.bias, abs=0.2)
    assert found.log_probability_weight == pytest.approx(TRUE.log_probability_weight, abs=0.1)
    assert found.similarity_weight == pytest.approx(TRUE.similarity_weight, abs=0.3)


def test_the_fit_does_not_depend_on_units_or_order() -> None:
    scores, right = drawn(300)
    found, order = fit_calibration(scores, right), torch.randperm(300)
    again = fit_calibration((scores * torch.tensor([10.0, 0.1]))[order], right[order])
    assert again.bias == pytest.approx(found.bias, abs=1e-5)
    assert again.log_probability_weight * 10 == pytest.approx(found.log_probability_weight, abs=1e-5)
    assert again.similarity_weight / 10 == pytest.approx(found.similarity_weight, abs=1e-5)


def test_the_mean_confidence_is_the_share_that_is_right() -> None:
    scores, right = drawn(300)
    found = fit_calibration(scores, right)
    mean = sum(found(*pair) for pair in scores.tolist()) / len(scores)
    assert mean == pytest.approx(right.double().mean().item(), abs=1e-6)


def test_captions_that_can_be_told_apart_without_fault_and_scores_that_are_all_equal() -> None:
    scores, right = torch.tensor([[-1.0, 0.3], [-2.0, 0.3], [-3.0, 0.3], [-4.0, 0.3]]), torch.tensor([1, 1, 0, 0])
    found = fit_calibration(scores, right)
    assert found.similarity_weight == pytest.approx(0.0, abs=1e-6)
    assert found(-1.0, 0.3) > found(-2.0, 0.3) > 0.5 > found(-3.0, 0.3) > found(-4.0, 0.3)
    for same in (torch.zeros(4), torch.ones(4)):
        with pytest.raises(ValueError, match="some of the captions must be right"):
            fit_calibration(scores, same)


def test_held_out_confidences_know_nothing_of_their_own_image() -> None:
    scores, right = drawn(200)
    groups = torch.arange(200) // 4
    found = held_out_confidences(scores, right, groups)
    flipped = right.clone()
    flipped[groups == 7] = 1 - flipped[groups == 7]
    again = held_out_confidences(scores, flipped, groups)
    same_fold = groups % 5 == 7 % 5
    assert torch.equal(found[same_fold], again[same_fold])
    assert not torch.isclose(found[~same_fold], again[~same_fold], atol=1e-9).any()


def test_bins_hold_every_caption_once_and_say_what_is_right_in_them() -> None:
    confidences = torch.tensor([0.0, 0.1, 0.5, 0.55, 0.95, 1.0], dtype=torch.float64)
    bins = reliability(confidences, torch.tensor([0, 1, 1, 0, 1, 1]))
    assert [found.count for found in bins] == [2, 2, 2]
    assert [found.predicted for found in bins] == pytest.approx([0.05, 0.525, 0.975])
    assert [found.observed for found in bins] == [0.5, 0.5, 1.0]


def test_judgements_drawn_from_the_confidence_are_as_often_right_as_it_says() -> None:
    scores, right = drawn(20_000)
    confidences = held_out_confidences(scores, right, torch.arange(20_000))
    for found in reliability(confidences, right):
        assert found.observed == pytest.approx(found.predicted, abs=0.04)


def test_a_caption_is_scored_as_when_it_was_written(model: Path, photos: list[Path]) -> None:
    pipeline = load(model, device="cpu")
    pipeline.calibration = TRUE
    written = pipeline.caption_details(photos, max_new_tokens=20, prefix="")
    ended = [
        (photo, own[0])
        for photo, own in zip(photos, written, strict=True)
        if own[0].token_ids[-1] == pipeline.tokenizer.eos_id
    ]
    again = [(photo, c) for photo, c in ended if tuple(pipeline.tokenizer.encode(c.text)) == c.token_ids]
    assert again
    for photo, caption in again:
        scores = caption_scores(pipeline, photo, caption.text)
        assert scores.mean_log_probability == pytest.approx(caption.log_probability / caption.length, abs=1e-4)
        assert scores.similarity == pytest.approx(caption.similarity, abs=1e-5)


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption", "right"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_script_prints_the_table_and_writes_the_numbers(
    script: ModuleType, model: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = load(model, device="cpu").save(tmp_path / "model")
    rows = [
        {"image": photo.name, "caption": text, "right": right}
        for photo in photos
        for text, right in (("a dog runs", "yes"), ("two children play in the water", 0))
    ]
    table = write_table(tmp_path / "judged.csv", rows)
    before = load(folder, device="cpu")
    assert script.main([str(table), "--model", str(folder)]) == 0
    assert load(folder, device="cpu").calibration is None
    assert script.main([str(table), "--model", str(folder), "--write"]) == 0
    printed = capsys.readouterr().out
    assert "20 captions, 50.0% of them right" in printed
    counts = [int(line.split("|")[3]) for line in printed.splitlines() if line.endswith("|") and "%" in line]
    assert sum(counts) == 2 * 20  # of both runs
    pipeline = load(folder, device="cpu")
    assert pipeline.info == {**before.info, **pipeline.calibration.to_info()}
    pairs = [caption_scores(pipeline, tmp_path / str(row["image"]), str(row["caption"])) for row in rows]
    expected = fit_calibration(torch.tensor(pairs, dtype=torch.float64), torch.tensor([1, 0] * 10))
    assert pipeline.calibration == expected
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), pipeline.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "no rows"),
        ([{"image": "0.png", "caption": "a dog", "right": "maybe"}], "line 2: right is 'maybe'"),
        ([{"image": "0.png", "caption": "", "right": 1}], "line 2: nothing in the column caption"),
        ([{"image": "0.png", "caption": "a dog", "right": 1}], "some of the captions must be right"),
        ([{"image": "none.png", "caption": "a dog", "right": 1}], "none.png"),
    ],
)
def test_tables_that_cannot_be_used(
    script: ModuleType,
    model: Path,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, object]],
    reason: str,
) -> None:
    table = write_table(tmp_path / "judged.csv", rows)
    assert script.main([str(table), "--model", str(model)]) == 2
    assert reason in capsys.readouterr().err
