"""`opencoca caption` with files as output: what it says, its exit codes, one sentence for each mistake."""

import json
import tarfile
from pathlib import Path

import pytest

from cli_helpers import text_as_jpeg
from opencoca.cli import build_parser, main
from opencoca.cli.generation_options import chosen_generation_options
from opencoca.data import list_images, open_source
from opencoca.generation import GenerationOptions

from .helpers import write_images, write_shard


@pytest.fixture
def argv(model_folder: Path, tmp_path: Path) -> list[str]:
    write_images(tmp_path / "images", 4)
    return ["caption", str(tmp_path / "images"), "--model", str(model_folder), "--device", "cpu"]


def sentences(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("opencoca: ")]


def test_files_and_exit_codes(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.jsonl"
    text_as_jpeg(tmp_path / "images" / "broken.jpg")
    assert main([*argv, "--out", str(out), "--memory", "1GB"]) == 2
    output = capsys.readouterr()
    assert output.out.startswith(f"4 captions of 4 images in {out}; ")
    assert output.out.endswith(f"1 images could not be read: {out}.errors.jsonl\n")
    assert "4/5" in output.err or "5/5" in output.err
    assert "image/s" in output.err or "s/image" in output.err
    assert main([*argv, "--out", str(out)]) == 2
    assert "is complete already" in sentences(capsys)[0]
    (tmp_path / "images" / "broken.jpg").unlink()
    assert main([*argv, "--out", str(out)]) == 2
    assert "--overwrite" in sentences(capsys)[0]
    assert main([*argv, "--out", str(out), "--overwrite"]) == 0
    assert len(out.read_text().splitlines()) == 4


def test_printed_and_written_captions_are_the_same(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--temperature", "0.8", "--num-captions", "2", "--seed", "3", "--max-new-tokens", "6"]
    assert main([*argv, *options, "--json", "--batch-size", "3"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert main([*argv, *options, "--out", str(tmp_path / "o.jsonl"), "--batch-size", "3"]) == 0
    written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in printed[0]} for row in written] == printed
    assert [row["rank"] for row in printed] == [0, 1] * 4


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        (["--out", "o.txt"], "must end in .jsonl, .csv or .parquet"),
        (["--out", "o.csv", "--json"], "--json is for captions that are printed"),
        (["--overwrite"], "give --out or --beside"),
        (["--memory", "lots"], "no amount of memory"),
        (["--memory", "1GB", "--batch-size", "3"], "give one of them"),
        (["--rerank", "2"], "rerank is 2"),
        (["--rerank", "x"], "nor `default`"),
        (["--rerank", "default"], "nothing to rerank"),
        (["--early-stopping", "maybe"], "'maybe' is none of false, true, never"),
        (["--top-p", "3"], "top_p is 3"),
        (["--out", "/dev/null/o.csv"], "cannot write"),
    ],
)
def test_mistakes(argv: list[str], extra: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, *extra]) == 2
    (sentence,) = sentences(capsys)
    assert part in sentence


def test_a_damaged_shard_is_reported_and_its_rest_used(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_shard(tmp_path / "s.tar", [1, 2, 3])
    with tarfile.open(shard) as archive:
        last = archive.getmembers()[-1].offset_data
    shard.write_bytes(shard.read_bytes()[: last + 100])
    assert main(["caption", str(shard), *argv[2:]]) == 2
    output = capsys.readouterr()
    assert output.out.startswith(f"{shard}/00001\t")
    assert "s.tar" in output.err
    assert "Warning" not in output.err


def test_every_option_of_generation_is_one_of_the_command() -> None:
    given = {
        "num_beams": 6,
        "num_captions": 3,
        "max_new_tokens": 9,
        "length_penalty": 0.5,
        "early_stopping": "never",
        "num_groups": 2,
        "diversity_penalty": 0.5,
        "prefix": "a",
        "no_repeat_ngram": 2,
        "forbidden_words": ("cat", "red car"),
    }
    argv = ["caption", "x.jpg"]
    for name, value in given.items():
        for one in value if isinstance(value, tuple) else (value,):
            argv += ["--" + name.replace("_", "-"), str(one)]
    assert chosen_generation_options(build_parser().parse_args(argv)) == GenerationOptions(**given)  # pyright: ignore
    assert chosen_generation_options(build_parser().parse_args(["caption", "x.jpg"])) == GenerationOptions()


def test_captions_can_be_trained_on_from_where_they_lie(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    out = tmp_path / "out" / "o.csv"
    relative = [argv[0], "../images", *argv[2:]]
    assert main([*relative, "--out", str(out), "--batch-size", "4"]) == 0
    monkeypatch.chdir(tmp_path)
    source = open_source("images", out)
    assert [source.key(index) for index in range(len(source))] == list_images("images")
