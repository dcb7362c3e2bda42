"""The Python that pages and the notebook show runs as printed, in order, by a small model under the names used."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from safetensors.torch import load_file

import opencoca
from cli_helpers import save_tiny_model
from opencoca.inference import loading
from opencoca.inference.loading import ShippedModel

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/usage.md", "docs/captioning.md", "docs/equality.md")
NOTEBOOK = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))


def snippets(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(code: list[str], name: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for number, part in enumerate(code):
        exec(compile(part, f"{name}, snippet {number}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), image_size=32)


@pytest.fixture(autouse=True)
def project(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has what snippets need of the project, and a small model for the shipped one."""
    shutil.copytree(ROOT / "demo" / "photos", tmp_path / "demo" / "photos")
    small = ShippedModel("coca-flickr8k", small_model, "a small model", "none")
    monkeypatch.setitem(loading.SHIPPED_MODELS, "coca-flickr8k", small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_pages(page: str) -> None:
    code = snippets(page)
    assert code
    run(code, page)


def test_python_page_does_what_it_says(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(snippets("docs/python.md"), "docs/python.md")
    printed = capsys.readouterr().out
    assert "Pipeline(coca-flickr8k, " in printed
    assert "a cat looks up" in printed
    saved = opencoca.load(project / "my-model")
    assert saved.tokenizer.to_json() == names["tokenizer"].to_json()
    stored = [load_file(project / name / "model.safetensors") for name in ("my-model", "my-model-16")]
    for name, weight in stored[0].items():
        assert torch.equal(stored[1][name], weight.half() if weight.ndim else weight)
    assert names["report"].captions.keys() == {"image 0", "image 1"}
    assert (project / "runs" / "mine" / "model.safetensors").is_file()
    assert names["mine"].embed_images(names["photos"]).shape == (2, names["model"].config.embed_dim)


def test_the_suggestion_that_python_page_quotes() -> None:
    page = " ".join((ROOT / "docs" / "python.md").read_text(encoding="utf-8").split())
    with pytest.raises(TypeError) as raised:
        opencoca.load().caption([], num_beam=4)  # pyright: ignore[reportCallIssue]
    assert f"`{raised.value}`" in page


def test_the_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib.use("Agg")
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    names = run(cells, "examples/first_steps.ipynb")
    printed = capsys.readouterr().out
    for photo, caption in zip(names["photos"], names["captions"], strict=True):
        assert f"{photo.name}: {caption}\n" in printed
    assert [axis.get_title() for axis in names["axes"][1:]] == list(names["words"])


def test_links_lead_to_files() -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))}
    pages[ROOT / "examples" / "first_steps.ipynb"] = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
    for page, text in pages.items():
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", text):
            assert (page.parent / target).exists(), f"{page.name} leads to {target}"
