"""Every score that a page or a command shows comes from a file under results/ or from the model's own folder."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from opencoca.cli import main
from opencoca.inference.loading import SHIPPED_MODELS, available_models
from opencoca.store.model_card import SCORES_FILE, read_scores, readable_score
from opencoca.store.published_models import PUBLISHED_MODELS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHIPPED = SHIPPED_MODELS["coca-flickr8k"].folder
RESULTS_OF_SHIPPED = tuple(ROOT / "results" / "flickr8k" / f"{task}.json" for task in ("captioning", "retrieval"))


def measured() -> dict[str, float]:
    """The scores of the shipped model as `opencoca evaluate` wrote them."""
    metrics: dict[str, float] = {}
    for file in RESULTS_OF_SHIPPED:
        stored = json.loads(file.read_text(encoding="utf-8"))
        assert stored["model"] == SHIPPED.name
        metrics |= stored["metrics"]
    return metrics


def percent(*names: str) -> str:
    return " / ".join(f"{100 * measured()[name]:.1f}" for name in names)


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`*") for cell in line.strip("|").split("|")] for line in lines]


def recalls(direction: str) -> str:
    return percent(*(f"{direction}_r{k}" for k in (1, 5, 10)))


def test_the_shipped_model_carries_its_measured_scores() -> None:
    stored = json.loads((SHIPPED / SCORES_FILE).read_text(encoding="utf-8"))
    assert stored == {"dataset": "flickr8k", "metrics": measured()}


def test_its_card_shows_them() -> None:
    rows = dict(row for row in table_rows((SHIPPED / "README.md").read_text(encoding="utf-8")) if len(row) == 2)
    for name, value in measured().items():
        shown = readable_score(name, value)
        assert rows[name] == (f"{shown:g}" if "rank" in name else f"{shown:.1f}"), name


def test_the_command_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "Flickr8k text-to-image" in line)
    shown = [float(number) for number in re.findall(r" (\d+\.\d)", line)]
    names = ("text_to_image_r1", "image_to_text_r1", "cider_d")
    assert shown == [round(100 * measured()[name], 1) for name in names]


def test_a_model_without_scores_has_none(tmp_path: Path) -> None:
    assert read_scores(tmp_path) == {}
    assert all(model.scores for model in available_models())


def test_readme_shows_the_scores_of_the_shipped_model() -> None:
    rows = table_rows(README)
    head = next(index for index, row in enumerate(rows) if row[0] == "CIDEr-D")
    assert rows[head][1:3] == ["BLEU-4", "ROUGE-L"]
    assert rows[head + 2] == [
        *(percent(name) for name in ("cider_d", "bleu_4", "rouge_l")),
        recalls("image_to_text"),
        recalls("text_to_image"),
    ]


def test_the_page_of_the_shipped_model_shows_them() -> None:
    rows = table_rows((ROOT / "results" / "flickr8k.md").read_text(encoding="utf-8"))
    (row,) = [row for row in rows if row[0].startswith("as shipped")]
    scores = [percent(name) for name in ("bleu_1", "bleu_4", "rouge_l", "cider_d")]
    assert row[1:] == [*scores, recalls("image_to_text"), recalls("text_to_image")]


NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?")


def numbers(text: str) -> list[str]:
    return [number.strip(",").replace(",", "") for number in NUMBER.findall(text)]


def lines_with_sources() -> Iterator[tuple[str, str]]:
    """(what a row of the README's table says, the page under results/ that it names)."""
    for row in table_rows(README):
        if found := re.fullmatch(r"\[(results/\w+\.md)\]\(\1\)", row[-1]):
            yield row[1], found[1]


@pytest.mark.parametrize(("said", "page"), list(lines_with_sources()), ids=lambda value: value[:40])
def test_every_number_in_readme_is_on_the_page_that_its_row_names(said: str, page: str) -> None:
    there = [float(number) for number in numbers((ROOT / page).read_text(encoding="utf-8"))]
    for shown in numbers(said):
        half_a_unit = 0.5 * 10 ** -len(shown.partition(".")[2]) + 1e-9
        assert any(abs(float(shown) - value) <= half_a_unit for value in there), f"{shown} is not in {page}"


def test_the_table_of_published_models_shows_what_the_code_knows() -> None:
    rows = table_rows((ROOT / "docs" / "models.md").read_text(encoding="utf-8"))
    shown = {f"{row[0]}@{row[1]}": row[2:] for row in rows if len(row) == 5}
    for model in PUBLISHED_MODELS:
        scores = model.scores
        imagenet, coco, captions = shown[model.full_name]
        assert float(imagenet) == scores["imagenet_top1"]
        expected = [scores["coco_text_to_image_r1"], scores["coco_image_to_text_r1"]]
        assert [float(value) for value in coco.split(" / ")] == expected
        captioning = [scores[name] for name in ("coco_cider", "coco_bleu_4", "nocaps_cider") if name in scores]
        assert [float(value) for value in re.findall(r" (\d+\.\d)", captions)] == captioning
