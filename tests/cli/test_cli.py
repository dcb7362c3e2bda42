"""Every command as a user types it: what it prints and writes, its exit code, and one sentence for each mistake."""

import argparse
import csv
import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import opencoca
from cli_helpers import (
    CAPTIONS,
    COLOURS,
    draw,
    huge_png,
    run_with_stdout,
    text_as_jpeg,
    truncated_jpeg,
    write_captions,
    write_csv,
)
from opencoca.cli import build_parser, main
from opencoca.generation import GenerationOptions
from opencoca.inference.loading import load
from opencoca.inference.pipeline import Pipeline
from opencoca.tokenizer import Tokenizer
from processes import start

DAMAGED = {
    "truncated.jpg": (truncated_jpeg, "damaged or cut short"),
    "text.jpg": (text_as_jpeg, "it is a text file, not an image"),
    "huge.png": (huge_png, "decompression bomb"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "the file is empty"),
}


@pytest.fixture(scope="module")
def pipeline(model: str) -> Pipeline:
    return load(model)


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    return write_captions(tmp_path / "captions.csv")


def paths_of(images: Path) -> list[str]:
    return [str(images / f"{name}.png") for name in sorted(COLOURS)]


def assert_mistake(capsys: pytest.CaptureFixture[str], argv: list[str], *parts: str) -> str:
    """The command ends with exit code 2 and one sentence on stderr that has these parts; progress bars aside."""
    code = main(argv)
    out, err = capsys.readouterr()
    sentences = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("opencoca: ")]
    assert code == 2
    assert len(sentences) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in sentences[0]
    return out


def run_python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120, **options
    )


# The program as a whole


def all_parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found += all_parsers(child)
    return found


def test_every_command_has_help_with_a_purpose_and_an_example() -> None:
    for parser in all_parsers(build_parser()):
        if parser.prog == "opencoca train":  # its help comes from the recipe
            continue
        text = parser.format_help()
        assert parser.description
        assert "example:\n  opencoca" in text or "COMMAND" in text
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), f"{parser.prog} {action.dest}"


def test_help_comes_without_pytorch() -> None:
    code = (
        "import sys\nfrom opencoca.cli import main\n"
        "try: main(['evaluate', 'retrieval', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'PIL', 'tqdm', 'jsonargparse'} & set(sys.modules)"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "recall at 1, 5 and 10" in result.stdout


def test_version_of_the_module_as_a_program() -> None:
    result = run_python("-m", "opencoca", "--version")
    assert (result.returncode, result.stdout) == (0, f"opencoca {opencoca.__version__}\n")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "COMMAND"),
        (["paint"], "'paint'"),
        (["caption"], "IMAGE"),
        (["caption", "x.jpg", "--batch-size", "0"], "'0'"),
        (["caption", "x.jpg", "--batch-size", "1" + "0" * 50], "is more than 1,000,000,000,000"),
        (["caption", "x.jpg", "--bogus"], "--bogus"),
        (["evaluate"], "COMMAND"),
        (["evaluate", "retrieval"], "--images"),
        (["data", "check"], "SOURCE"),
        (["train"], "RECIPE"),
        (["train", "--epochs", "3"], "RECIPE"),
    ],
)
def test_wrong_arguments_are_one_sentence(capsys: pytest.CaptureFixture[str], argv: list[str], part: str) -> None:
    assert_mistake(capsys, argv, part)


def test_debug_shows_where_a_mistake_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCOCA_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["caption", "x.jpg", "--model", "nowhere"])


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("opencoca.inference.loading.load", interrupt)
    assert main(["caption", "x.jpg"]) == 130
    assert capsys.readouterr().err == "opencoca: interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes and /dev/full are of POSIX systems")
@pytest.mark.parametrize(
    ("stdout", "code", "error"),
    [
        ("closed pipe", 141, ""),
        ("/dev/full", 2, "opencoca: cannot write the output: No space left on device\n"),
    ],
)
def test_closed_pipe_is_quiet_and_full_disk_is_one_sentence(
    stdout: str, code: int, error: str, model: str, images: Path, tmp_path: Path
) -> None:
    if stdout.startswith("/dev") and not Path(stdout).exists():
        pytest.skip(f"there is no {stdout}")
    arguments = ["caption", str(images), "--model", model]
    process = start(run_with_stdout, stdout, arguments, output=tmp_path / "stderr.txt")
    process.join(120)
    assert (process.exitcode, (tmp_path / "stderr.txt").read_text(encoding="utf-8")) == (code, error)


# caption, classify, embed


def test_caption(model: str, pipeline: Pipeline, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["caption", str(images), "--model", model, "--max-new-tokens", "9", "--min-new-tokens", "4"]
    assert main([*argv, "--prefix", "a photo", "--batch-size", "3"]) == 0
    expected = pipeline.caption(paths_of(images), max_new_tokens=9, min_new_tokens=4, prefix="a photo")
    lines = [f"{path}\t{' '.join(text.split())}" for path, text in zip(paths_of(images), expected, strict=True)]
    assert capsys.readouterr().out.split("\n")[:-1] == lines
    assert all(text.startswith("a photo") for text in expected)


def test_caption_as_json(model: str, pipeline: Pipeline, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = paths_of(images)[::-1]
    assert main(["caption", *chosen, "--model", model, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    details = [captions[0] for captions in pipeline.caption_details(chosen)]
    assert [row["image"] for row in rows] == chosen
    assert [row["caption"] for row in rows] == [detail.text for detail in details]
    assert [row["log_probability"] for row in rows] == pytest.approx([d.log_probability for d in details], abs=1e-4)


@pytest.mark.parametrize("command", [["caption"], ["classify", "--labels", "red,blue"]])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_image_is_reported_and_the_others_are_used(
    model: str, images: Path, capsys: pytest.CaptureFixture[str], name: str, command: list[str]
) -> None:
    make, reason = DAMAGED[name]
    make(images / name)
    out = assert_mistake(capsys, [*command, str(images), "--model", model], name, reason)
    assert [line.split("\t")[0] for line in out.split("\n")[:-1]] == paths_of(images)


def test_nothing_but_damaged_images(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert assert_mistake(capsys, ["caption", str(tmp_path / "no.jpg"), "--model", model], "no such file") == ""


def test_empty_folder_and_unknown_model(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert_mistake(capsys, ["caption", str(tmp_path / "empty")], "empty", "holds no images")
    assert_mistake(capsys, ["caption", str(images), "--model", "gpt"], "'gpt'", "coca-flickr8k")
    assert_mistake(capsys, ["caption", str(images), "--model", str(images)], "config.json")


def test_classify(model: str, pipeline: Pipeline, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["red", "green", "blue", "a white wall"]
    argv = ["classify", str(images), "--model", model, "--labels", " red,green,blue, a white wall,"]
    assert main([*argv, "--json", "--top", "9", "--batch-size", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, path, expected in zip(rows, paths_of(images), pipeline.classify(paths_of(images), labels), strict=True):
        assert row["image"] == path
        found = {score["label"]: score["probability"] for score in row["labels"]}
        assert found == pytest.approx({score.label: score.probability for score in expected}, abs=1e-5)
        assert sum(found.values()) == pytest.approx(1)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    assert main([*argv, "--top", "2", "--templates", "simple"]) == 0
    for line, scores in zip(
        capsys.readouterr().out.splitlines(),
        pipeline.classify(paths_of(images), labels, "a photo of a {}."),
        strict=True,
    ):
        assert line.split("\t")[1:] == [f"{score.label} {score.probability:.1%}" for score in scores[:2]]


def test_classify_mistakes(model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["classify", str(images), "--model", model, "--labels"]
    assert_mistake(capsys, [*argv, ","], "labels")
    assert_mistake(capsys, argv[:-1], "give the labels to choose from")
    assert_mistake(capsys, [*argv, "cat,dog,cat"], "'cat'", "more than once")
    assert_mistake(capsys, [*argv, "cat", "--templates", str(tmp_path / "no.txt")], "no.txt")
    (tmp_path / "bad.txt").write_text("a photo\n")
    assert_mistake(capsys, [*argv, "cat", "--templates", str(tmp_path / "bad.txt")], "bad.txt", "{}")


def test_embed(model: str, pipeline: Pipeline, images: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a blue one\n\na green one\n")
    texts = ["a red one", "a blue one", "a green one"]
    argv = ["embed", str(images), "--texts", texts[0], "--texts-file", str(tmp_path / "texts.txt"), "--model", model]
    expected = pipeline.embed_images(paths_of(images)), pipeline.embed_texts(texts)
    assert main([*argv, "--batch-size", "3", "--out", str(tmp_path / "new" / "e.npz")]) == 0
    with np.load(tmp_path / "new" / "e.npz", allow_pickle=False) as stored:
        assert stored["image_names"].tolist() == paths_of(images)
        assert stored["texts"].tolist() == texts
        for name, value in zip(("image_embed", "text_embed"), expected, strict=True):
            assert stored[name].dtype == np.float32
            np.testing.assert_allclose(stored[name], value.numpy(), atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(stored[name], axis=1), 1, atol=1e-5)
    assert main([*argv, "--out", str(tmp_path / "e.safetensors")]) == 0
    with safe_open(tmp_path / "e.safetensors", "pt") as stored:
        assert json.loads(stored.metadata()["image_names"]) == paths_of(images)
        assert json.loads(stored.metadata()["texts"]) == texts
        torch.testing.assert_close(stored.get_tensor("image_embed"), expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(stored.get_tensor("text_embed"), expected[1], atol=1e-5, rtol=0)
    assert main(["embed", str(images), "--model", model, "--out", str(tmp_path / "e.npy")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), expected[0].numpy(), atol=1e-5)
    assert json.loads((tmp_path / "e.npy.names.json").read_text()) == paths_of(images)


def test_embed_mistakes(model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "e.npz")
    assert_mistake(capsys, ["embed", str(images), "--out", str(tmp_path / "e.txt")], "e.txt", ".npz")
    assert_mistake(capsys, ["embed", "--out", out], "nothing to embed")
    assert_mistake(capsys, ["embed", str(images), "--texts", "a", "--out", str(tmp_path / "e.npy")], "one array")
    assert_mistake(capsys, ["embed", str(images), "--out", str(images)], "images")
    truncated_jpeg(images / "bad.jpg")
    assert_mistake(capsys, ["embed", str(images), "--model", model, "--out", out], "bad.jpg", "cut short")
    assert len(np.load(out)["image_names"]) == len(COLOURS)


def test_full_disk_leaves_the_old_file(
    model: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "e.npz"
    out.write_text("old")
    captions = write_captions(tmp_path / "captions.csv")
    monkeypatch.setattr("opencoca.system.files.flush_to_disk", full)
    sentence = "No space left on device"
    embed = ["embed", str(images), "--model", model, "--out", str(out), "--overwrite"]
    assert_mistake(capsys, embed, str(out), sentence)
    argv = ["evaluate", "retrieval", "--images", str(images), "--captions", str(captions), "--model", model]
    assert "image to text R@1" in assert_mistake(capsys, [*argv, *embed[-3:]], str(out), sentence)
    assert_mistake(capsys, ["tokenizer", "train", str(captions), "--out", f"{tmp_path}/t.json"], "t.json", sentence)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.csv", "e.npz", "images"]


# evaluate


def evaluate(task: str, tmp_path: Path, *arguments: str, code: int = 0) -> dict:
    out = tmp_path / "scores.json"
    assert main(["evaluate", task, *arguments, "--out", str(out), "--overwrite"]) == code
    return json.loads(out.read_text())


def test_evaluate_retrieval(
    model: str, images: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--images", str(images), "--captions", str(captions), "--model", model]
    report = evaluate("retrieval", tmp_path, *data)
    out, err = capsys.readouterr()
    assert f"{100 * report['metrics']['image_to_text_r1']:.2f}" in out.split("image to text R@1")[1].splitlines()[0]
    assert "embedding images: 100%" in err
    assert report["counts"] == {"images": 4, "captions": 8, "images_without_captions": 0, "broken_images": 0}
    assert report["data"] == {"images": str(images), "captions": str(captions)}
    assert (report["task"], report["model"]) == ("retrieval", model)
    assert report["opencoca_version"] == opencoca.__version__
    assert report["settings"]["batch_size"] == 32
    assert report["seconds"] > 0
    truncated_jpeg(images / "red.png")
    damaged = evaluate("retrieval", tmp_path, *data, "--batch-size", "1", code=2)
    assert damaged["counts"]["images"] == 3
    assert [broken["image"] for broken in damaged["broken_images"]] == ["red.png"]
    limited = evaluate("retrieval", tmp_path, *data, "--limit", "2", code=2)
    assert limited["counts"]["images"] + limited["counts"]["broken_images"] == 2


def test_evaluate_captioning(
    model: str, pipeline: Pipeline, images: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "captions.jsonl"
    data = ["--images", str(images), "--captions", str(captions), "--model", model]
    report = evaluate("captioning", tmp_path, *data, "--save-captions", str(saved))
    out = capsys.readouterr().out
    assert set(report["metrics"]) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"}
    assert [line.split()[0] for line in out.splitlines()[:6]] == [
        *(f"BLEU-{n}" for n in range(1, 5)),
        "ROUGE-L",
        "CIDEr-D",
    ]
    rows = [json.loads(line) for line in saved.read_text().split("\n")[:-1]]
    assert {row["image"]: row["references"] for row in rows} == {f"{name}.png": own for name, own in CAPTIONS.items()}
    expected = pipeline.caption([images / row["image"] for row in rows])
    assert [row["caption"] for row in rows] == expected


def test_evaluate_captioning_decodes_as_the_caption_command_does(
    model: str, images: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoding = ["--num-beams", "3", "--max-new-tokens", "8", "--rerank", "0.5", "--model", model]
    saved = tmp_path / "captions.jsonl"
    data = ["--images", str(images), "--captions", str(captions), "--save-captions", str(saved)]
    settings = evaluate("captioning", tmp_path, *data, *decoding)["settings"]
    assert (settings["num_beams"], settings["max_new_tokens"], settings["rerank"]) == (3, 8, 0.5)
    assert {field.name for field in dataclasses.fields(GenerationOptions)} <= set(settings)
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    capsys.readouterr()
    assert main(["caption", *(str(images / row["image"]) for row in rows), *decoding]) == 0
    printed = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    assert printed == [row["caption"] for row in rows]


def test_evaluate_zero_shot(model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = write_csv(tmp_path / "labels.csv", ["image", "label"], [[f"{name}.png", name] for name in COLOURS])
    from_table = evaluate("zero-shot", tmp_path, "--images", str(images), "--labels", str(labels), "--model", model)
    assert from_table["counts"] == {"images": 4, "labels": 4, "templates": 80, "broken_images": 0}
    assert set(from_table["metrics"]) == {"top1", "top5", "mean_per_class"}
    assert "top-1" in capsys.readouterr().out
    for name in COLOURS:
        (tmp_path / "classes" / name).mkdir(parents=True)
        (images / f"{name}.png").rename(tmp_path / "classes" / name / "one.png")
    from_folders = evaluate("zero-shot", tmp_path, "--images", str(tmp_path / "classes"), "--model", model)
    assert from_folders["metrics"] == from_table["metrics"]
    assert from_folders["data"]["labels"] is None


def test_evaluate_with_other_columns(model: str, images: Path, captions: Path, tmp_path: Path) -> None:
    rows = [[f"{name}.png", text, str(number)] for number, name in enumerate(COLOURS) for text in CAPTIONS[name]]
    other = write_csv(tmp_path / "other.csv", ["file", "words", "kind"], rows)
    usual = ["retrieval", tmp_path, "--images", str(images), "--model", model, "--captions"]
    named = ["--image-column", "file", "--caption-column", "words"]
    expected = evaluate(*usual, str(captions))["metrics"]
    assert evaluate(*usual, str(other), *named)["metrics"] == expected
    labels = ["--labels", str(other), "--image-column", "file", "--label-column", "kind", "--templates", "simple"]
    report = evaluate("zero-shot", tmp_path, "--images", str(images), "--model", model, *labels)
    assert report["counts"]["labels"] == 4
    write_csv(images / "metadata.csv", ["file_name", "text", "label"], rows)
    assert evaluate(*usual[:-1])["metrics"] == expected
    by_metadata = evaluate("zero-shot", tmp_path, "--images", str(images), "--model", model, "--templates", "simple")
    assert by_metadata["metrics"] == report["metrics"]


def test_evaluate_mistakes(
    model: str, images: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retrieval = ["evaluate", "retrieval", "--model", model, "--images", str(images)]
    assert_mistake(capsys, retrieval, "--captions")
    assert_mistake(capsys, [*retrieval, "--captions", "no.csv"], "no.csv")
    bad = write_csv(tmp_path / "bad.csv", ["image", "words"], [["red.png", "a"]])
    assert_mistake(capsys, [*retrieval, "--captions", str(bad)], "bad.csv", "'caption'", "'words'")
    (images / "blue.png").unlink()
    assert_mistake(capsys, [*retrieval, "--captions", str(captions)], "blue.png")
    assert_mistake(capsys, [*retrieval, "--captions", str(captions), "--out", str(tmp_path)], "it is a folder")
    for name in COLOURS:
        text_as_jpeg(images / f"{name}.png")
    assert_mistake(capsys, [*retrieval, "--captions", str(captions)], "can be read", "text file")
    zero_shot = ["evaluate", "zero-shot", "--model", model, "--images", str(images)]
    assert_mistake(capsys, zero_shot, "sub-folder")
    assert_mistake(capsys, [*zero_shot, "--labels", str(captions)], "'label'")


# data, tokenizer, models


def test_data_check(images: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    argv = ["data", "check", "--images", str(images), "--captions", str(captions), "--json", str(out), "--overwrite"]
    assert main(argv) == 0
    assert "captions per image" in capsys.readouterr().out
    assert json.loads(out.read_text())["num_captions"] == 8
    truncated_jpeg(images / "red.png")
    (images / "blue.png").unlink()
    printed = assert_mistake(capsys, argv, "1 broken images", "1 missing images")
    assert "red.png: it is damaged or cut short" in printed
    assert json.loads(out.read_text())["missing_images"] == ["blue.png"]
    assert_mistake(capsys, ["data", "check", str(images), "--images", str(images)], "once")
    assert_mistake(capsys, ["data", "check", str(tmp_path / "nowhere")], "nowhere")


def test_data_pack_gives_shards_that_every_command_reads(
    model: str, images: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--images", str(images), "--captions", str(captions)]
    assert main(["data", "pack", *data, "--out", str(tmp_path / "shards"), "--samples-per-shard", "3"]) == 0
    assert "4 samples in 2 shards" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "shards")]) == 0
    folder = evaluate("retrieval", tmp_path, *data, "--model", model)
    shards = evaluate("retrieval", tmp_path, "--images", str(tmp_path / "shards"), "--model", model)
    assert shards["metrics"] == folder["metrics"]
    truncated_jpeg(images / "red.png")
    assert_mistake(capsys, ["data", "pack", *data, "--out", str(tmp_path / "more")], "1 images", "errors.jsonl")
    assert_mistake(capsys, ["data", "pack", *data, "--out", str(tmp_path / "o"), "--quality", "101"], "101")


def test_data_commands_carry_labels(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, report = tmp_path / "labels.csv", tmp_path / "report.json"
    table.write_text("image,kind\nred.png,warm\nblue.png,cold\ngreen.png,cold\n")
    shards = ["--out", str(tmp_path / "shards")]
    labels = ["--images", str(images), "--labels", str(table), "--label-column", "kind"]
    assert main(["data", "pack", *labels, *shards]) == 0
    for data in (labels, [str(tmp_path / "shards")]):
        assert main(["data", "check", *data, "--json", str(report), "--overwrite"]) == 0
        assert json.loads(report.read_text())["classes"] == [["cold", 2], ["warm", 1]]
    assert "2; most frequent: cold (2)" in capsys.readouterr().out
    assert_mistake(capsys, ["data", "check", str(images), "--labels", "folders"], "no image", "sub-folder")


def test_tokenizer_train(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [text for own in CAPTIONS.values() for text in own]
    (tmp_path / "captions.txt").write_text("\n".join(texts) + "\n\n")
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({"caption": own}) + "\n" for own in CAPTIONS.values()))
    write_csv(tmp_path / "only.csv", ["text"], [[text] for text in texts])
    stored = []
    for name, more in (
        ("captions.csv", []),
        ("captions.txt", []),
        ("captions.jsonl", []),
        ("only.csv", ["--caption-column", "text"]),
    ):
        out = tmp_path / f"{name}.json"
        argv = ["tokenizer", "train", str(tmp_path / name), "--out", str(out), "--vocab-size", "270", *more]
        assert main(argv) == 0
        stored.append(out.read_text())
    assert len(set(stored)) == 1
    tokenizer = Tokenizer.load(tmp_path / "only.csv.json")
    assert tokenizer.vocab_size == 270
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert main(["tokenizer", "train", str(captions), "--out", str(tmp_path), "--keep-case"]) == 0
    assert Tokenizer.load(tmp_path).normalize("A Dog") == "A Dog"
    capsys.readouterr()
    argv = ["tokenizer", "train", "--out", str(tmp_path / "t.json")]
    assert_mistake(capsys, [*argv, str(tmp_path / "only.csv"), "--caption-column", "x"], "only.csv", "'x'", "'text'")
    assert_mistake(capsys, [*argv, str(tmp_path / "no.csv")], "no.csv")
    assert_mistake(capsys, [*argv, str(captions), "--vocab-size", "100"], "100", "259")
    (tmp_path / "blank.txt").write_text("\n\n")
    assert_mistake(capsys, [*argv, str(tmp_path / "blank.txt")], "no captions")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert_mistake(capsys, [*argv, str(tmp_path / "latin.txt")], "latin.txt")
    assert not (tmp_path / "t.json").exists()


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "coca-flickr8k" in out
    assert "licence" in out


# train


def write_recipe(path: Path, images: Path, captions: Path, more: str = "") -> Path:
    path.write_text(
        f"""
size: tiny
model:
  embed_dim: 16
  image: {{image_size: [16, 16], patch_size: 8, width: 16, depth: 1, num_heads: 2, mlp_width: 16}}
  pooler: {{num_queries: 3, num_heads: 2}}
  text:
    {{context_length: 24, width: 16, unimodal_depth: 1, multimodal_depth: 1, num_heads: 2, mlp_width: 16}}
data: {{train_images: {images}, train_captions: {captions}, num_workers: 0}}
tokenizer: {{source: train, vocab_size: 300}}
batch_size: 2
epochs: 1
precision: fp32
device: cpu
{more}
"""
    )
    return path


def test_train_gives_a_model_that_the_other_commands_load(
    images: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", images, captions)
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--output", str(run), "--max_steps", "2"]) == 0
    assert str(run) in capsys.readouterr().out
    assert main(["caption", str(images), "--model", str(run)]) == 0


def test_train_help_lists_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for part in ("opencoca train RECIPE", "data.train_images: ", "optimizer.learning_rate: 0.001 ", "--continue-with"):
        assert part in out


def is_unexplained(line: str, after: str) -> bool:
    """Whether a line of help has a key and its value alone, and the line after it explains nothing either."""
    is_key = line.partition(":")[0].replace(".", "").replace("_", "").isalnum() and "   " not in line.strip()
    return is_key and line.startswith(("model.", "task.", "data.")) and not after.startswith("   ")


def test_train_help_shows_the_values_of_a_recipe(
    images: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", images, captions)
    assert main(["train", str(recipe), "--help", "--epochs", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("epochs: 7 ") and "passes over the training images" in line for line in lines)
    assert any(line.startswith("batch_size: 2 ") and "images a step" in line for line in lines)
    assert any(line.startswith("model.text.width: 16") for line in lines)
    assert max(map(len, lines)) <= 120
    unexplained = [line for line, after in zip(lines, [*lines[1:], ""], strict=True) if is_unexplained(line, after)]
    assert unexplained == []
    assert main(["train", "flickr8k", "--help"]) == 0
    assert "batch_size: 96 " in capsys.readouterr().out


def test_train_mistakes(images: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_mistake(capsys, ["train", str(tmp_path / "no.yaml")], "no.yaml")
    wrong = write_recipe(tmp_path / "wrong.yaml", images, captions, "epoch: 3")
    assert_mistake(capsys, ["train", str(wrong)], "wrong.yaml", "epoch")
    recipe = write_recipe(tmp_path / "recipe.yaml", images, captions)
    argv = ["train", str(recipe), "--output", str(tmp_path / "run")]
    assert_mistake(capsys, [*argv, "--optimizer.learningrate", "1"], "did you mean optimizer.learning_rate?")
    assert_mistake(capsys, ["train", "flickr8"], "there is no recipe flickr8; did you mean flickr8k?")
    assert_mistake(capsys, [*argv, "--continue-with"], "--continue-with needs KEY=VALUE")
    assert_mistake(capsys, [*argv, "--continue-with", "epochs=3"], "holds no run to continue")
    assert_mistake(capsys, [*argv, "--batch_size", "many"], "batch_size")
    assert_mistake(capsys, [*argv, "--data.train_images", str(tmp_path / "gone")], "gone")
    no_column = write_csv(tmp_path / "no_column.csv", ["image", "words"], [["red.png", "a"]])
    assert_mistake(capsys, [*argv, "--data.train_captions", str(no_column)], "no_column.csv", "'caption'")
    with open(captions, "a", newline="") as file:
        csv.writer(file).writerow(["lost.png", "a lost picture"])
    assert_mistake(capsys, argv, "lost.png")


def test_train_that_is_stopped(
    images: Path, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from opencoca.train.step import NonFiniteLossError
    from opencoca.train.trainer import TrainingInterrupted

    recipe = write_recipe(tmp_path / "recipe.yaml", images, captions)

    def stop_with(error: Exception) -> None:
        def stop(*_: object) -> None:
            raise error

        monkeypatch.setattr("opencoca.train.train", stop)

    stop_with(NonFiniteLossError("the loss is nan at step 3"))
    assert_mistake(capsys, ["train", str(recipe)], "the loss is nan at step 3")
    stop_with(TrainingInterrupted("stopped at step 3"))
    assert main(["train", str(recipe)]) == 130
    assert capsys.readouterr().err == "opencoca: stopped at step 3\n"


def test_names_that_are_no_unicode(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        draw(COLOURS["red"]).save(tmp_path / name, "PNG")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes Unicode names alone")
    stdout, stderr = tmp_path / "stdout.txt", tmp_path / "stderr.txt"
    process = start(run_with_stdout, str(stdout), ["caption", str(tmp_path), "--model", model], output=stderr)
    process.join(120)
    assert (process.exitcode, stderr.read_text(encoding="utf-8")) == (0, "")
    assert "caf\\udce9.png\t" in stdout.read_text(encoding="utf-8")


def test_commands_that_load_a_model_keep_freed_memory(monkeypatch):
    told = []
    monkeypatch.setattr("opencoca.system.allocator.keep_freed_memory", lambda: told.append(True))
    assert main(["models"]) == 0
    assert told == []
    assert main(["caption", str(Path(__file__).parents[2] / "demo" / "photos" / "cat.jpg")]) == 0
    assert told == [True]
