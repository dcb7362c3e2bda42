"""The repository that `opencoca push` writes, and the two commands about models."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from cli_helpers import save_tiny_model
from hub_fixtures import hub  # noqa: F401
from hub_server import Hub
from opencoca.cli import main
from opencoca.inference.loading import load
from opencoca.store import published_models
from opencoca.store.model_card import Result, model_card, write_repository
from opencoca.store.model_folder import load_model_folder
from opencoca.store.published_models import PUBLISHED_MODELS

METRICS = {
    "task": "retrieval",
    "metrics": {"image_to_text_r1": 0.3125, "text_to_image_median_rank": 5.0},
    "data": {"captions": "/home/someone/flickr8k/val.csv", "images": "flickr8k/images"},
    "counts": {"images": 1000},
    "opencoca_version": "0.1.0",
}
REPO = "someone/my-coca"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def metrics(tmp_path: Path) -> str:
    file = tmp_path / "retrieval.json"
    file.write_text(json.dumps(METRICS))
    return str(file)


def test_the_card_has_the_scores_and_metadata_that_the_hub_reads(folder: Path, metrics: str) -> None:
    text = model_card(load_model_folder(folder), REPO, licence="mit", results=[Result.read(metrics)])
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert card.data.library_name == "opencoca"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"image_to_text_r1": 31.25, "text_to_image_median_rank": 5.0}
    assert "| image_to_text_r1 | 31.25 |" in text
    assert "| text_to_image_median_rank | 5 |" in text
    assert "flickr8k/val.csv, 1,000 images" in text
    assert "/home" not in text
    assert f'opencoca.load("hf-hub:{REPO}")' in text


def test_without_scores_the_card_says_so(folder: Path) -> None:
    text = model_card(load_model_folder(folder), REPO, licence="other")
    assert "None were given" in text
    assert "model-index" not in yaml.safe_load(text.split("---")[1])


def test_the_repository_is_a_model_folder_without_anybodys_paths(folder: Path, tmp_path: Path) -> None:
    loaded = load_model_folder(folder)
    loaded.info.update(recipe={"data": ["/home/someone/data/val.csv", "C:\\Users\\me\\run"], "seed": 3})
    write_repository(tmp_path / "out", loaded, REPO, licence="mit", dtype=torch.float16)
    again = load_model_folder(tmp_path / "out")
    assert again.info["recipe"] == {"data": ["data/val.csv", "me/run"], "seed": 3}
    assert again.model.lm_head.weight.dtype == torch.float16
    torch.testing.assert_close(again.model.lm_head.weight.float(), loaded.model.lm_head.weight, atol=1e-3, rtol=0)


def test_push_writes_a_folder(folder: Path, metrics: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["push", str(folder), REPO, "--metrics", metrics, "--out", str(out)]) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    ours, theirs = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in ours.keys() | theirs.keys())
    assert "31.25" in (out / "README.md").read_text()


def test_a_dry_run_shows_and_leaves_nothing(
    folder: Path,
    hub: Hub,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["push", str(folder), REPO, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown
    assert "# my-coca" in shown
    assert hub.requests == []


def test_pushed_is_loaded_back(
    folder: Path,
    hub: Hub,  # noqa: F811
    metrics: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["push", str(folder), REPO, "--metrics", metrics, "--licence", "mit"]
    assert main(command) == 2
    assert "run `hf auth login`" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main(command) == 0
    assert f'opencoca.load("hf-hub:{REPO}")' in capsys.readouterr().out
    ours, theirs = load(f"hf-hub:{REPO}"), load(folder)
    difference = ours.embed_texts("a red picture") - theirs.embed_texts("a red picture")
    assert difference.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my-coca"], "'my-coca' is no repository's name; write it as organisation/name"),
        ([REPO, "--metrics", "nowhere.json"], "nowhere.json: No such file"),
        ([REPO, "--dtype", "int3"], "'int3' is none of float32"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"task": "x"}', '{"task": "x", "metrics": {"a": "b"}}'])
def test_a_file_without_scores_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json holds no scores .*opencoca evaluate"):
        Result.read(tmp_path / "x.json")


def test_models_tells_what_is_downloaded(
    hub: Hub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = PUBLISHED_MODELS[0]
    hub.add(model.repo_id, **{model.file_name: b"weights"})
    monkeypatch.setattr(published_models, "PUBLISHED_MODELS", (model,))
    main(["models", "--json"])
    before = json.loads(capsys.readouterr().out)
    assert hub.requests == []
    assert before["published"][0]["file"] is None
    assert before["shipped"][0]["size_bytes"] > 1e6
    from opencoca.store.hub import download

    download(model.repo_id, model.file_name)
    main(["models", "--json"])
    after = json.loads(capsys.readouterr().out)
    assert Path(after["published"][0]["file"]).read_bytes() == b"weights"
    main(["models"])
    shown = capsys.readouterr().out
    assert f"{model.full_name} (1.01 GB, downloaded)" in shown
    assert "ImageNet zero-shot 63.6" in shown
    assert "licence: MIT" in shown
