"""The commands that pages show run as printed, by a small model on small images, and say their own lines alone."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from cli_helpers import COLOURS, draw, save_tiny_model, write_captions, write_colours, write_csv
from opencoca.cli import main
from opencoca.inference import loading
from opencoca.inference.loading import ShippedModel

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
# Those that need a run, a recipe's data, a network or minutes; tests of their own show what they do.
ELSEWHERE = re.compile(
    r"opencoca (train|plan|push|convert|export|quantize)\b|coca-int8| - <|runs/|://|hf-hub:|coca_ViT|coca-b32|--coco\b"
)


def commands(page: str) -> list[str]:
    """The lines of a page's blocks of code that are commands, continued lines joined."""
    found: list[str] = []
    within, text = False, (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("```"):
            within = not within
        elif within and line.startswith("opencoca ") and not ELSEWHERE.search(line):
            found.append(line)
    return found


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def project(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the files that commands name, and a small model for the shipped one."""
    small = ShippedModel("coca-flickr8k", small_model, "a small model", "none")
    monkeypatch.setitem(loading.SHIPPED_MODELS, "coca-flickr8k", small)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "photos").mkdir(parents=True)
    for number, photo in enumerate(sorted((ROOT / "demo" / "photos").glob("*.jpg"))):
        draw((60, 9 * number, 90), number).save(tmp_path / "demo" / "photos" / photo.name)
    draw((1, 2, 3)).save(tmp_path / "photo.jpg")
    shutil.copytree(write_colours(tmp_path / "DIR"), tmp_path / "DIR" / "images")
    shutil.copytree(tmp_path / "DIR" / "images", tmp_path / "DIR" / "train" / "colour")
    for name in ("train.csv", "DIR/train.csv", "DIR/val.csv", "val.csv"):
        write_captions(tmp_path / name)
    rows = [[f"{name}.png", name, name] for name in COLOURS]
    for name in ("train.csv", "DIR/labels.csv"):
        write_csv(tmp_path / name, ["image", "caption", "label"], rows)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
@pytest.mark.usefixtures("project")
def test_commands_of_a_page(page: str, capfd: pytest.CaptureFixture[str]) -> None:
    for command in commands(page):
        if " data pack " in command:
            shutil.rmtree("shards", ignore_errors=True)  # of another data set
        code = main(shlex.split(command, comments=True)[1:])
        told = capfd.readouterr()
        lines = [
            line for line in re.split(r"[\r\n]+", told.err) if line.strip() and not re.search(r"\d+%\|| 0it ", line)
        ]
        assert code == 0, f"{command}: {lines}"
        assert all(line.startswith("opencoca: ") for line in lines), f"{command}: {lines}"
        assert told.out.strip(), command
