"""The demo and the photographs that it ships."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from cli_helpers import save_tiny_model
from opencoca.generation.confidence import CaptionCalibration
from opencoca.inference.loading import load

DEMO = Path(__file__).parents[1] / "demo"
PHOTOS = sorted((DEMO / "photos").glob("*.jpg"))


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("opencoca_demo", DEMO / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_photograph_has_its_source_and_a_free_licence() -> None:
    rows = re.findall(r"^\| (\S+\.jpg) \|(.*)\|$", (DEMO / "photos" / "SOURCES.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == [photo.name for photo in PHOTOS]
    assert len(PHOTOS) == 15
    for _, row in rows:
        author, licence, source = [cell.strip() for cell in row.split("|")][1:]
        assert author
        assert source
        assert licence.startswith(("public domain", "CC0"))


def test_photographs_are_small() -> None:
    for photo in PHOTOS:
        with Image.open(photo) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= 640
    sizes = [photo.stat().st_size for photo in PHOTOS]
    assert max(sizes) < 90_000
    assert sum(sizes) < 900_000


def test_demo_draws_and_prints_what_the_model_says(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out" / "sheet.png"
    assert demo.main(["--model", str(model), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    pipeline = load(model)
    best = pipeline.similarity(PHOTOS, demo.QUERIES).argmax(dim=0).tolist()
    for photo in PHOTOS:
        assert f"{photo.name}\n  caption: " in printed
    for query, index in zip(demo.QUERIES, best, strict=True):
        assert f'"{query}" finds {PHOTOS[index].name} (similarity ' in printed
    assert str(out) in printed
    with Image.open(out) as sheet:
        assert sheet.size[0] == 1600


def test_captions_that_are_probably_wrong_are_called_unsure(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = load(save_tiny_model(tmp_path / "model"), device="cpu")
    for bias, unsure in ((-3.0, len(PHOTOS)), (3.0, 0)):
        pipeline.info = CaptionCalibration(bias, 0.0, 0.0).to_info()
        folder = pipeline.save(tmp_path / "calibrated", overwrite=True)
        assert demo.main(["--model", str(folder), "--out", str(tmp_path / "sheet.png")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("  caption: ") and line.endswith(" (unsure)") for line in lines) == unsure


def test_demo_mistakes(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--photos", str(tmp_path)]) == 2
    assert demo.main(["--model", str(tmp_path / "nowhere")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("demo: ") for line in lines)
