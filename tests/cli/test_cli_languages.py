"""--language, command by command."""

import json
from pathlib import Path

import numpy as np
import pytest

from cli_helpers import COLOURS, save_tiny_model, write_csv
from opencoca.cli import main
from opencoca.inference import loading
from opencoca.inference.loading import ShippedModel, load
from opencoca.inference.pipeline import Pipeline
from opencoca.tokenizer import Tokenizer

CAPTIONS = {"zh": "一张{}色的图", "de": "ein Bild in {}", "en": "a {} picture"}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("spoken"), languages=("en", "zh", "de")))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [[f"{name}.png", language, text.format(name)] for name in COLOURS for language, text in CAPTIONS.items()]
    return write_csv(tmp_path / "t.csv", ["image", "lang", "caption"], rows)


@pytest.fixture
def pipeline(spoken: str) -> Pipeline:
    return load(spoken)


def test_captions_are_written_in_the_language(spoken: str, images: Path, pipeline: Pipeline, tmp_path: Path, capsys):
    paths = sorted(map(str, images.glob("*.png")))
    for language in ("zh", "de"):
        assert main(["caption", *paths, "--model", spoken, "--language", language, "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        expected = pipeline.caption_details(paths, language=language)
        assert [row["log_probability"] for row in rows] == [round(own[0].log_probability, 4) for own in expected]
    out = ["caption", *paths, "--model", spoken, "--out", str(tmp_path / "o.jsonl")]
    assert main([*out, "--language", "zh"]) == 0
    assert json.loads((tmp_path / "o.jsonl.run.json").read_text())["settings"]["language"] == "zh"


def test_texts_and_labels_are_in_the_language(spoken: str, images: Path, pipeline: Pipeline, tmp_path: Path, capsys):
    out = tmp_path / "e.npy"
    assert main(["embed", "--texts", "ein Hund", "--out", str(out), "--model", spoken, "--language", "de"]) == 0
    np.testing.assert_allclose(np.load(out), pipeline.embed_texts("ein Hund", language="de").numpy(), atol=1e-6)
    capsys.readouterr()
    photo = str(images / "red.png")
    assert main(["classify", photo, "--labels", "rot,blau", "--model", spoken, "--language", "de", "--json"]) == 0
    (label, probability), *_ = pipeline.classify(photo, ["rot", "blau"], language="de")[0]
    best = json.loads(capsys.readouterr().out)["labels"][0]
    assert (best["label"], best["probability"]) == (label, pytest.approx(probability))


def test_one_language_is_evaluated(spoken: str, images: Path, table: Path, tmp_path: Path, capsys):
    data = ["--model", spoken, "--images", str(images), "--captions", str(table)]
    out, written = tmp_path / "s.json", tmp_path / "c.jsonl"
    options = ["--language", "zh", "--save-captions", str(written), "--out", str(out), "--max-new-tokens", "5"]
    assert main(["evaluate", "captioning", *data, *options]) == 0
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (printed["language"], printed["tokens"], printed["captions"]) == ("zh", "characters", "4")
    found = json.loads(out.read_text())
    assert (found["language"], found["tokens"]) == ("zh", "characters")
    references = [json.loads(line)["references"] for line in written.read_text(encoding="utf-8").splitlines()]
    assert sorted(text for own in references for text in own) == sorted(CAPTIONS["zh"].format(name) for name in COLOURS)
    some = write_csv(
        tmp_path / "some.csv", ["image", "lang", "caption"], [["red.png", "de", "rot"], ["blue.png", "en", "b"]]
    )
    options = ["--language-column", "lang", "--save-captions", str(written), "--overwrite"]
    assert (
        main(["evaluate", "captioning", *data[:-1], str(some), *options]) == 0
    )  # what is in the model's first language
    (row,) = map(json.loads, written.read_text(encoding="utf-8").splitlines())
    assert (row["image"], row["references"]) == ("blue.png", ["b"])
    capsys.readouterr()
    for options, count in ((["--language", "de"], 4), (["--language-column", "lang"], 12), ([], 4)):
        assert main(["evaluate", "retrieval", *data, *options, "--out", str(out), "--overwrite"]) == 0
        assert json.loads(out.read_text())["counts"]["captions"] == count
    capsys.readouterr()
    assert main(["evaluate", "captioning", *data, "--language", "de", "--coco"]) == 2
    assert "METEOR and SPICE are computed for English alone, not for de" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["caption", "embed", "classify", "evaluate"])
def test_a_model_of_one_language_refuses_in_one_sentence(
    command: str, model: str, images: Path, table: Path, tmp_path, capsys
):
    arguments = {
        "caption": [str(images)],
        "embed": ["--texts", "a dog", "--out", str(tmp_path / "e.npy")],
        "classify": [str(images), "--labels", "a,b"],
        "evaluate": ["retrieval", "--images", str(images), "--captions", str(table)],
    }[command]
    assert main([command, *arguments, "--model", model, "--language", "zh"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the model knows no languages, so 'zh' cannot be chosen" in line


def test_models_tell_their_languages(spoken: str, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(loading.SHIPPED_MODELS, "spoken", ShippedModel("spoken", Path(spoken), "tiny", "none"))
    assert main(["models"]) == 0
    assert capsys.readouterr().out.count("languages: en, zh, de\n") == 1
    assert main(["models", "--json"]) == 0
    languages = {model["name"]: model["languages"] for model in json.loads(capsys.readouterr().out)["shipped"]}
    assert languages == {"coca-flickr8k": [], "spoken": ["en", "zh", "de"]}


def test_a_vocabulary_of_several_languages(table: Path, tmp_path: Path):
    out = tmp_path / "v.json"
    assert (
        main(["tokenizer", "train", str(table), "--out", str(out), "--vocab-size", "300", "--languages", "en, zh"]) == 0
    )
    assert Tokenizer.load(out).languages == ("en", "zh")
