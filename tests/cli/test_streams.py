"""Nothing but a command's own lines reaches the user, and closed streams do no harm."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path

import pytest

from cli_helpers import draw, write_captions
from opencoca.cli import main
from opencoca.inference import loading
from opencoca.system.messages import escaped
from opencoca.system.notice import Notice


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loading a model chatter in every way that libraries have."""
    load = loading.load

    def loud(*arguments: object) -> object:
        warnings.warn("raw warning", UserWarning, stacklevel=1)
        warnings.warn("Glyph 29483 missing from font(s)", UserWarning, stacklevel=2)
        logging.getLogger("library").error("a record of the log")
        os.write(2, b"TIFFReadDirectory: Warning, unknown field\n")
        return load(*arguments)  # pyright: ignore

    monkeypatch.setattr(loading, "load", loud)


def write_chattering_images(folder: Path) -> None:
    """A palette with an alpha for each colour, of which Pillow warns, and a strip that libtiff cannot decode."""
    palette = draw((200, 30, 30)).convert("P")
    palette.info["transparency"] = bytes(range(256))
    palette.save(folder / "palette.png")
    draw((30, 30, 200)).resize((200, 200)).save(folder / "lzw.tif", compression="tiff_lzw")
    data = bytearray((folder / "lzw.tif").read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    (folder / "damaged.tif").write_bytes(data)


def own_lines(err: str) -> list[str]:
    """The lines on stderr, without progress bars; each must be one of ours."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert all(line.startswith("opencoca: ") for line in lines), err
    return lines


@pytest.mark.usefixtures("noisy")
@pytest.mark.parametrize(
    "argv",
    [
        ["caption", "IMAGES"],
        ["caption", "IMAGES", "--out", "OUT.jsonl"],
        ["classify", "IMAGES", "--labels", "red,blue"],
        ["embed", "IMAGES", "--out", "OUT.npz"],
        ["explain", "IMAGES", "--caption", "a 猫", "--out", "OUT.png"],
        ["evaluate", "retrieval", "--images", "IMAGES", "--captions", "CAPTIONS"],
    ],
)
def test_no_library_is_heard(
    argv: list[str], model: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_chattering_images(images)
    names = {"IMAGES": str(images), "CAPTIONS": str(write_captions(tmp_path / "captions.csv"))}
    argv = [names.get(word, word.replace("OUT", str(tmp_path / "out"))) for word in argv]
    assert main([*argv, "--model", model, "--device", "cpu"]) in (0, 2)
    out, err = capfd.readouterr()
    assert len(own_lines(err)) <= 1, "the damaged image at most"
    assert "raw warning" not in out
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n", "the descriptor is as it was before"
    assert logging.getLogger("library").isEnabledFor(logging.ERROR)


def test_own_notices_are_sentences(
    model: str, images: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    load = loading.load

    def load_with_notice(*arguments: object) -> object:
        warnings.warn("something is\nworth knowing", Notice, stacklevel=2)
        return load(*arguments)  # pyright: ignore

    monkeypatch.setattr(loading, "load", load_with_notice)
    assert main(["caption", str(images), "--model", model]) == 0
    assert own_lines(capfd.readouterr().err) == ["opencoca: something is worth knowing"]


@pytest.mark.parametrize("error", [RuntimeError, BaseException, RecursionError])
def test_a_fault_is_one_sentence_and_its_traceback_a_file(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise error("a fault\nof a library")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(loading, "load", fail)
    (tmp_path / "x.jpg").touch()
    assert main(["caption", str(tmp_path / "x.jpg")]) == 1
    (line,) = own_lines(capfd.readouterr().err)
    (kept,) = tmp_path.glob("opencoca-fault-*.txt")
    assert f"{error.__name__}: a fault of a library" in line
    assert str(kept) in line
    assert kept.read_text().startswith("Traceback")


def test_too_little_memory_is_no_fault(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(loading, "load", fail)
    assert main(["caption", "x.jpg"]) == 2
    assert "not enough memory" in own_lines(capfd.readouterr().err)[0]


def test_closed_streams(
    model: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.jsonl"
    argv = ["caption", str(images), "--model", model]
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main([*argv, "--out", str(out)]) == 0
    assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == sorted(map(str, images.iterdir()))
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stdout", None)
    assert main(argv) == 2
    assert "standard output is closed" in own_lines(capfd.readouterr().err)[0]


@pytest.mark.parametrize("name", ["two\nlines.png", "red\x1b[31m.png", "two  spaces.png"])
def test_names_never_reach_a_terminal_raw(
    name: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    draw((1, 2, 3)).save(tmp_path / name, "PNG")
    for argv in (["caption"], ["classify", "--labels", "a,b"]):
        assert main([*argv, str(tmp_path), "--model", model]) == 0
        (line,) = capfd.readouterr().out.splitlines()
        assert line.split("\t")[0] == escaped(str(tmp_path / name))
        assert line.split("\t")[0].isprintable()
