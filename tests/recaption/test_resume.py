"""A run that is killed, at any moment and however often, ends with the same bytes as one that is not."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_helpers import text_as_jpeg
from opencoca.cli import main
from opencoca.inference.pipeline import Pipeline
from opencoca.recaption import Destination, caption_to_files, open_inputs
from processes import kill, start

from .helpers import make_captioner, write_images

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are of POSIX systems")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def in_child(work: Callable[[], None]) -> multiprocessing.Process:
    """A process of its own; forked, because to start Python anew for every kill would take minutes."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def die_at(number: int) -> None:
    """Kills this process at its n-th call that changes or flushes a file."""
    calls = 0

    def deadly(function: Callable) -> Callable:
        def call(*args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("fsync", "replace", "unlink", "ftruncate"):
        setattr(os, name, deadly(getattr(os, name)))


@pytest.mark.parametrize(("suffix", "beside"), [(".parquet", False), (".csv", True)])
def test_killed_at_every_step(pipeline: Pipeline, tmp_path: Path, suffix: str, beside: bool) -> None:
    """Before each flush, rename, removal and cut, the run after the kill being killed at the next step, and so on."""
    images = write_images(tmp_path / "images", 5)
    inputs = [*images[:2], str(text_as_jpeg(tmp_path / "images" / "broken.jpg")), *images[2:]]
    captioner = make_captioner(pipeline, temperature=1.0)

    def run(folder: Path) -> None:
        source = open_inputs(inputs)
        destination = Destination.of(source, folder / f"o{suffix}", beside)
        caption_to_files(captioner, source, destination, batch_size=2)

    def texts() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "images").rglob("*.txt*")}

    run(tmp_path / "whole")
    expected, expected_texts = contents(tmp_path / "whole"), texts()
    assert set(expected) == {f"o{suffix}", f"o{suffix}.errors.jsonl", f"o{suffix}.run.json"}
    assert len(expected_texts) == (5 if beside else 0)
    kills = 0
    for step in range(1, 100):
        for path in (tmp_path / "images").rglob("*.txt"):
            path.unlink()

        def work(step: int = step) -> None:
            die_at(step)
            run(tmp_path / f"killed{step}")

        child = in_child(work)
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        run(tmp_path / f"killed{step}")
        assert contents(tmp_path / f"killed{step}") == expected, step
        assert texts() == expected_texts
    assert kills >= 10


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_random_moments(pipeline: Pipeline, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 60)
    captioner = make_captioner(pipeline, top_p=0.9, num_captions=2)

    def run(name: str) -> None:
        source = open_inputs(images)
        caption_to_files(captioner, source, Destination.of(source, tmp_path / name / "o.csv", False), batch_size=2)

    run("whole")
    journal, chance, kills = tmp_path / "killed" / "o.csv.journal", random.Random(0), 0
    while kills < 8 and not (tmp_path / "killed" / "o.csv").exists():
        until = lines(journal) + chance.randint(0, 8)
        child = in_child(lambda: run("killed"))
        while child.exitcode is None and lines(journal) < until:
            time.sleep(0.0005)
        child.join(chance.uniform(0, 0.005))
        if child.exitcode is None:
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
            kills += 1
    assert kills >= 3
    run("killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    with open(tmp_path / "whole" / "o.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 2 * 60


def command(arguments: list[str]) -> None:
    sys.exit(main(arguments))


def test_the_command_goes_on_after_a_kill(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user meets it: the same command, twice, and once more when all is done."""
    write_images(tmp_path / "images", 40)
    argv = ["caption", str(tmp_path / "images"), "--model", str(model_folder)]
    argv += ["--max-new-tokens", "20", "--min-new-tokens", "20", "--batch-size", "1", "--device", "cpu"]
    argv += ["--out", str(tmp_path / "killed" / "o.jsonl")]
    for _ in range(5):  # on a busy machine a run may be over before it is seen to have begun
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        process = start(command, argv, output=tmp_path / "printed.txt")
        journal = tmp_path / "killed" / "o.jsonl.journal"
        while process.is_alive() and lines(journal) <= 5:
            time.sleep(0.002)
        kill(process)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "o.jsonl").exists()
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert "of 40 images in" in printed.err
    assert "40 captions of 40 images in" in printed.out
    assert main([*argv[:-1], str(tmp_path / "whole" / "o.jsonl")]) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
