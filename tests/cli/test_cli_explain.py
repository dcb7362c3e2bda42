"""`opencoca explain`, and likelihood in `classify` and `evaluate`: what users type and what they get."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli_helpers import COLOURS, text_as_jpeg, write_captions, write_csv
from opencoca.cli import main
from opencoca.inference.loading import load


def test_explain_draws_and_stores(model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, arrays = tmp_path / "new" / "red.png", tmp_path / "red.npz"
    argv = ["explain", str(images / "red.png"), "--caption", "a red picture", "--model", model]
    assert main([*argv, "--out", str(out), "--npz", str(arrays), "--layers", "-1"]) == 0
    assert capsys.readouterr().out == f"{images / 'red.png'}\ta red picture\n{out}\t{arrays}\n"
    with Image.open(out) as sheet:
        assert (sheet.format, sheet.width) == ("PNG", 1600)
    with np.load(arrays) as stored:  # no pickles in it
        assert stored["words"].tolist() == ["a", "red", "picture"]
        assert str(stored["caption"]) == "a red picture"
        maps = load(model).explain(images / "red.png", "a red picture").maps
        np.testing.assert_allclose(stored["weights"], maps.weights.numpy(), atol=1e-6)
        np.testing.assert_allclose(stored["weights"].sum(axis=-1), 1, atol=1e-5)
        np.testing.assert_allclose(stored["log_probs"], maps.log_probs.numpy(), atol=1e-5)
        assert stored["grid"].tolist() == [2, 2]
        assert stored["box"].tolist() == pytest.approx(
            [2 * 32 / 21, 0, 18 * 32 / 21, 24]
        )  # resized to 21 x 16, cut to 16


def test_explain_has_no_option_that_does_nothing(model: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(images / "red.png"), "--model", model, "--batch-size", "2"]) == 2
    assert "--batch-size" in capsys.readouterr().err


def test_explain_several_with_the_models_captions(
    model: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [str(images / "blue.png"), str(images / "red.png")]
    captions = load(model).caption(paths)
    assert all(caption.split() for caption in captions)
    assert main(["explain", *paths, "--model", model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *(f"{path}\t{caption}" for path, caption in zip(paths, captions, strict=True)),
        "blue.explained.png",
    ]
    with Image.open(tmp_path / "blue.explained.png") as sheet:
        assert sheet.width == 1600


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--out", "picture.jpg"], "ends in .png"),
        (["--npz", "arrays.npy"], "ends in .npz"),
        (["--layers", "first"], "no list of layers"),
        (["--layers", "5"], "no layer 5"),
        (["--caption", " "], "has no words"),
        (["SECOND", "--npz", "arrays.npz"], "one image's arrays"),
    ],
)
def test_explain_mistakes(
    model: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    more = [str(images / "blue.png") if word == "SECOND" else word for word in more]
    assert main(["explain", str(images / "red.png"), *more, "--model", model]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert part in captured.err
    assert not list(tmp_path.glob("*.png"))


def test_explain_a_damaged_image(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = text_as_jpeg(tmp_path / "text.jpg")
    assert main(["explain", str(path), "--model", model, "--out", str(tmp_path / "out.png")]) == 2
    assert "text.jpg" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("by", ["likelihood", "both"])
def test_classify_by_likelihood(model: str, images: Path, capsys: pytest.CaptureFixture[str], by: str) -> None:
    paths = [str(images / f"{name}.png") for name in COLOURS]
    assert main(["classify", *paths, "--labels", "red,blue", "--by", by, "--json", "--model", model]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = load(model).classify(paths, ["red", "blue"], by=by)  # pyright: ignore
    for row, scores in zip(rows, expected, strict=True):
        assert [label["label"] for label in row["labels"]] == [score.label for score in scores]
        assert [label["probability"] for label in row["labels"]] == pytest.approx([s.probability for s in scores])


@pytest.mark.parametrize("by", ["similarity", "likelihood", "both"])
def test_evaluate_by_likelihood(
    model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    captions = write_captions(tmp_path / "captions.csv")
    data = ["--images", str(images), "--model", model, "--by", by]
    out = tmp_path / "retrieval.json"
    argv = ["evaluate", "retrieval", *data, "--captions", str(captions), "--rerank-top", "3", "--out", str(out)]
    assert main(argv) == 0
    assert "image to text R@1" in capsys.readouterr().out
    retrieval = json.loads(out.read_text())
    assert (retrieval["settings"]["by"], retrieval["settings"]["rerank_top"]) == (by, 3)

    pipeline = load(model)
    paths = [images / f"{name}.png" for name in COLOURS]
    found = pipeline.classify(paths, sorted(COLOURS), ["a photo of a {}."], by=by)  # pyright: ignore
    rows = [[path.name, scores[0].label] for path, scores in zip(paths, found, strict=True)]
    names = write_csv(tmp_path / "names.csv", ["label", "name"], [[name, name] for name in sorted(COLOURS)])
    labels = write_csv(tmp_path / "labels.csv", ["image", "label"], rows)
    out = tmp_path / "zero_shot.json"
    argv = ["evaluate", "zero-shot", *data, "--labels", str(labels), "--class-names", str(names)]
    assert main([*argv, "--templates", "simple", "--out", str(out)]) == 0
    zero_shot = json.loads(out.read_text())
    assert (zero_shot["metrics"]["top1"], zero_shot["settings"]["by"]) == (1, by)


def test_evaluate_mistakes(model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = str(write_captions(tmp_path / "captions.csv"))
    argv = ["evaluate", "retrieval", "--images", str(images), "--captions", captions, "--model", model]
    assert main([*argv, "--by", "both", "--rerank-top", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err
    assert main([*argv, "--by", "taste"]) == 2
    assert "'taste' is none of similarity, likelihood, both" in capsys.readouterr().err
