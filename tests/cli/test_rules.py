"""The rules that all commands follow: nothing is overwritten unasked, inputs are named alike, mistakes are guessed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from cli_helpers import all_parsers, write_captions, write_csv
from opencoca.cli import build_parser, main


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Overwriting

WRITERS = [
    ["caption", "IMAGES", "--out", "FILE.jsonl"],
    ["embed", "IMAGES", "--out", "FILE.npz"],
    ["embed", "IMAGES", "--out", "FILE.npy"],
    ["explain", "IMAGES", "--out", "FILE.png"],
    ["explain", "ONE", "--npz", "FILE.npz"],
    ["evaluate", "retrieval", "--images", "IMAGES", "--captions", "CAPTIONS", "--out", "FILE.json"],
    ["evaluate", "captioning", "--images", "IMAGES", "--captions", "CAPTIONS", "--save-captions", "FILE.jsonl"],
    ["data", "check", "IMAGES", "--json", "FILE.json"],
    ["tokenizer", "train", "CAPTIONS", "--out", "FILE.json"],
    ["report", "run1", "run2", "--out", "FILE.html"],
    ["convert", "open-clip", "coca_ViT-B-32", "weights.bin", "FOLDER"],
    ["export", "onnx", "MODEL", "FOLDER"],
    ["export", "open-clip", "MODEL", "FOLDER"],
    ["quantize", "MODEL", "FOLDER"],
    ["quantize", "MODEL", "NEW", "--out", "FILE.json"],
    ["push", "MODEL", "me/it", "--out", "FOLDER"],
]


@pytest.mark.parametrize("argv", WRITERS, ids=" ".join)
def test_what_exists_is_not_overwritten(
    argv: list[str],
    model: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before any work, and nothing but what was there is there afterwards."""
    monkeypatch.chdir(tmp_path)
    captions = write_captions(tmp_path / "captions.csv")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    names = {"IMAGES": images, "ONE": images / "red.png", "CAPTIONS": captions, "MODEL": model, "FOLDER": folder}
    argv = [str(names.get(word, word)) for word in argv]
    for word in argv:
        if word.startswith("FILE"):
            Path(word).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("load", "load_model"):
        monkeypatch.setattr(f"opencoca.inference.loading.{name}", lambda *_: pytest.fail("the work was begun"))
    if argv[0] == "caption":  # its journal must know the model's settings
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        argv += ["--model", model]
    assert "--overwrite" in refusal(capsys, argv)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwrite_replaces(model: str, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.npz"
    out.write_text("mine")
    assert main(["embed", str(images), "--model", model, "--out", str(out), "--overwrite"]) == 0
    assert out.read_bytes()[:2] == b"PK"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    "argv",
    # `tokenizer train` takes a folder: it puts tokenizer.json into it.
    [argv for argv in WRITERS if argv[0] != "tokenizer" and any(word.startswith("FILE") for word in argv)],
    ids=" ".join,
)
def test_a_folder_in_place_of_a_file_is_refused_before_the_work(
    argv: list[str],
    overwrite: list[str],
    model: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opencoca.inference.loading.load", lambda *_: pytest.fail("the work was begun"))
    captions = write_captions(tmp_path / "captions.csv")
    names = {"IMAGES": images, "ONE": images / "red.png", "CAPTIONS": captions, "MODEL": model}
    argv = [str(names.get(word, word)) for word in argv]
    (out,) = (word for word in argv if word.startswith("FILE"))
    Path(out).mkdir()
    assert "it is a folder" in refusal(capsys, [*argv, *overwrite])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["captions.csv"]


def test_every_command_that_writes_has_overwrite() -> None:
    for parser in all_parsers(build_parser()):
        options = {action.dest: action for action in parser._actions}
        writes = {"out", "out_dir", "npz", "save_captions"} & set(options) or "FILE" in str(
            getattr(options.get("json"), "metavar", None)
        )
        if writes and parser.prog != "opencoca data pack":  # which continues, and replaces what is its own alone
            assert "overwrite" in options, parser.prog


# Inputs


def keys(capsys: pytest.CaptureFixture[str], argv: list[str], model: str) -> list[str]:
    capsys.readouterr()
    assert main([*argv, "--model", model]) == 0
    return [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    "command",
    [["caption"], ["classify", "--labels", "a,b"], ["explain", "--caption", "a dog", "--out", "e.png", "--overwrite"]],
)
def test_every_command_takes_images_in_the_same_ways(
    command: list[str],
    model: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = sorted(str(path) for path in images.iterdir())
    table = write_csv(tmp_path / "t.csv", ["picture"], [[Path(path).name] for path in expected])
    lines = "\n".join(expected).encode()
    ways = [[str(images)], [f"{images}/*.png"], [str(table), "--image-root", str(images), "--image-column", "picture"]]
    for way in [*ways, ["-"]]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
        assert keys(capsys, [*command, *way], model)[:4] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((images / "red.png").read_bytes())))
    assert keys(capsys, [*command, "-"], model)[0].startswith("stdin-")


def test_an_image_from_standard_input_has_the_caption_of_the_file(
    model: str, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["caption", str(images / "red.png"), "--model", model, "--json"]) == 0
    from_file = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((images / "red.png").read_bytes())))
    assert main(["caption", "-", "--model", model, "--json"]) == 0
    from_stdin = json.loads(capsys.readouterr().out)
    assert {**from_stdin, "image": ""} == {**from_file, "image": ""}


@pytest.mark.parametrize(
    ("argv", "stdin", "part"),
    [
        (["https://example.org/cat.jpg"], b"", "download it first"),
        (["s3://bucket/cat.jpg?x=1"], b"", "download it first"),
        (["-"], b"", "neither an image nor a list"),
        (["-"], b"\x00\xff\x00\xfe" * 100, "neither an image nor a list"),
        (["-"], b"https://example.org/cat.jpg\n", "download it first"),
        (["nothing/*.jpg"], b"", "no images that match"),
    ],
)
@pytest.mark.parametrize("command", [["caption"], ["classify", "--labels", "a,b"], ["embed", "--out", "e.npz"]])
def test_inputs_that_cannot_be_used(
    command: list[str],
    argv: list[str],
    stdin: bytes,
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    assert part in refusal(capsys, [*command, *argv])


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "retrieval", "--images", "https://h/t.csv"],
        ["evaluate", "retrieval", "--images", "IMAGES", "--captions", "https://h/t.csv"],
        ["evaluate", "zero-shot", "--images", "https://h/photo.JPG"],
        ["evaluate", "zero-shot", "--images", "IMAGES", "--labels", "s3://h/t.csv"],
        ["evaluate", "zero-shot", "--images", "IMAGES", "--class-names", "https://h/t.csv"],
        ["data", "check", "https://h/t.parquet"],
        ["data", "pack", "--images", "IMAGES", "--captions", "https://h/t.jsonl", "--out", "new"],
        ["data", "index", "https://h/t.csv", "--index-dir", "new"],
        ["tokenizer", "train", "https://h/t.csv", "--out", "new"],
        ["tokenizer", "train", "https://h/t.txt", "--out", "new"],
        ["embed", "--texts-file", "https://h/t.txt", "--out", "new.npz"],
        ["classify", "IMAGES", "--labels", "a,b", "--templates", "https://h/t.txt"],
    ],
    ids=" ".join,
)
def test_web_addresses_are_refused_with_what_to_do(
    argv: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in images.iterdir():  # folders of classes
        (images / "a").mkdir(exist_ok=True)
        name.rename(images / "a" / name.name)
    said = refusal(capsys, [word.replace("IMAGES", str(images)) for word in argv])
    assert "is a web address, not a file; download it first" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("out", ["x" * 245 + ".jsonl", "x" * 260 + ".csv"])
def test_a_name_that_is_too_long_is_refused_before_the_work(
    out: str, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    monkeypatch.setattr("opencoca.inference.loading.load", lambda *_: pytest.fail("the work was begun"))
    assert "(File name too long); choose a shorter name" in refusal(capsys, ["caption", "red.png", "--out", out])


# Names and help


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["capton", "x.jpg"], "did you mean caption?"),
        (["caption", "x.jpg", "--num_beams", "4"], "did you mean --num-beams?"),
        (["caption", "x.jpg", "--batchsize=4"], "did you mean --batch-size?"),
        (["classify", "x.jpg", "--by", "likelyhood"], "did you mean likelihood?"),
        (["evaluate", "retreival"], "did you mean retrieval?"),
        (["export", "open_cilp", "m", "f"], "did you mean open-clip?"),
        (["caption", "x.jpg", "--zzz"], "there is no option --zzz; `opencoca caption --help`"),
        (["models", "extra"], "the argument 'extra' is one too many"),
    ],
)
def test_what_was_meant(argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert meant in refusal(capsys, argv)


def test_names_of_before_are_still_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no-such-file" in refusal(
        capsys, ["convert", "open_clip", "coca_ViT-B-32", "no-such-file.bin", str(tmp_path / "new")]
    )
    parsed = build_parser().parse_args(["report", "run", "--output", "x.html"])
    assert parsed.out == "x.html"


def test_names_have_hyphens() -> None:
    for parser in all_parsers(build_parser()):
        assert "_" not in parser.prog
        for action in parser._actions:
            assert not any("_" in option for option in action.option_strings), parser.prog


def test_help_shows_the_usual_options_and_all_of_them_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    for parser in all_parsers(build_parser()):
        shown, everything = parser.format_help(), parser.format_help(everything=True)
        assert len(shown.splitlines()) <= 75, f"{parser.prog} --help is long"
        for action in parser._actions:
            for option in action.option_strings:
                assert option in everything
    with pytest.raises(SystemExit):
        main(["caption", "--help-all"])
    everything = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["caption", "--help"])
    shown = capsys.readouterr().out
    assert "--top-p" in everything
    assert "FILE.journal" in everything
    assert "--top-p" not in shown
    assert "--num-beams" in shown
    assert "--help-all" in shown


def test_verbose_says_what_was_chosen(model: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", str(images), "--model", model, "--device", "cpu", "--verbose"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"opencoca: model {model} in float32 on cpu, 1 thread",
        "opencoca: 4 images at a time",
    ]


@pytest.mark.parametrize(("chosen_by_user", "threads"), [(False, 1), (True, 2)])
def test_threads_are_not_more_than_processors_are_free(
    model: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    chosen_by_user: bool,
    threads: int,
) -> None:
    monkeypatch.setattr("opencoca.system.cpu.free_processors", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for argv in (["caption", str(images), "--model", model, "--verbose"], ["quantize", model, str(tmp_path / "small")]):
        torch.set_num_threads(2)
        try:
            assert main(argv) == 0
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    line = capsys.readouterr().err.splitlines()[0]
    assert line.endswith(", 2 threads" if chosen_by_user else "(OMP_NUM_THREADS sets another number)")


def test_captions_are_continued_with_the_threads_that_they_were_begun_with(
    model: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opencoca import recaption
    from opencoca.recaption import run

    begun, out = [], tmp_path / "captions.jsonl"

    def stop(*arguments: object) -> None:
        begun.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_work", stop)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for free in (2, 1):
        monkeypatch.setattr("opencoca.system.cpu.free_processors", lambda free=free: free)
        torch.set_num_threads(2)
        try:
            assert main(["caption", str(images), "--model", model, "--out", str(out)]) == 130
        finally:
            torch.set_num_threads(1)
    assert begun == [2, 2]
    assert recaption.journal_threads(out.with_name("captions.jsonl.journal")) == 2
