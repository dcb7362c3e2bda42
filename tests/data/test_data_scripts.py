"""The scripts that choose what is trained on: captions that fit their images, images that are not kept for tests."""

import csv
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import opencoca

SCRIPTS = Path(__file__).parents[2] / "scripts"
Run = Callable[..., object]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a script with arguments; returns its exit status."""

    def run(name: str, *arguments: object) -> object:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as status:
            return status.code
        return 0

    return run


class SeesNumbers:
    """A model to which image 7.jpg and a caption that ends in 5 have a cosine of cos(2)."""

    def embed_images(self, images: Sequence[Path], batch_size: int) -> torch.Tensor:
        return torch.stack([at(int(image.stem)) for image in images])

    def embed_texts(self, texts: Sequence[str], progress: bool) -> torch.Tensor:
        return torch.stack([at(int(text[-1])) for text in texts])


def at(angle: float) -> torch.Tensor:
    return torch.tensor([angle]).cos() * torch.tensor([1.0, 0.0]) + torch.tensor([angle]).sin() * torch.tensor(
        [0.0, 1.0]
    )


def test_captions_that_fit_best_are_kept_in_their_order(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opencoca, "load", lambda *_: SeesNumbers())
    rows = [("1.jpg", "off by 2: 3", "x"), ("1.jpg", "fits: 1", "y"), ("2.jpg", "off by 1, nearly: 3", "z")]
    source, output = tmp_path / "captions.csv", tmp_path / "better.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "clip"), *rows])
    assert run("filter_captions.py", source, output, "--images", tmp_path, "--keep", 0.667) == 0
    with output.open(newline="") as file:
        assert [tuple(row) for row in csv.reader(file)] == [("image", "caption", "clip"), *rows[1:]]
    assert run("filter_captions.py", source, output, "--images", tmp_path, "--keep", 1) == 0
    assert len(output.read_text().splitlines()) == 4
    assert run("filter_captions.py", source, output, "--images", tmp_path, "--keep", 0) == 2
    source.write_text("file,caption\n1.jpg,fits: 1\n")
    assert "has no column 'image'; it has file, caption" in str(
        run("filter_captions.py", source, output, "--images", tmp_path)
    )


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """To train on: three pictures of noise; kept: the first, smaller and compressed, the second, mirrored, another."""
    train, kept = tmp_path / "train", tmp_path / "kept"
    for folder in (train, kept):
        folder.mkdir()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (8, 12, 3), np.uint8)).resize((240, 160)) for _ in range(4)]
    for index, image in enumerate(images[:3]):
        image.save(train / f"{index}.png")
    images[0].resize((120, 80)).save(kept / "small.jpg", quality=60)
    images[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(kept / "mirrored.png")
    images[3].save(kept / "another.png")
    return train, kept


def test_images_that_look_alike_are_found(
    run: Run, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train, kept = folders
    assert run("find_near_duplicates.py", train, "--against", kept) == 1
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    pairs = {(Path(one).name, Path(other).name) for one, other, _ in lines}
    assert pairs == {("0.png", "small.jpg"), ("1.png", "mirrored.png")}
    (kept / "small.jpg").unlink()
    (kept / "mirrored.png").unlink()
    assert run("find_near_duplicates.py", train, "--against", kept) == 0
    assert "3 images against 1: 0 pairs" in capsys.readouterr().out


def test_names_that_are_kept_out_are_found(
    run: Run, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, _ = folders
    names = tmp_path / "names.txt"
    names.write_text("2.png\n7.png\n\n")
    assert run("find_near_duplicates.py", train, "--names", names) == 1
    assert "3 images, 2 names kept out: 1 have such a name" in capsys.readouterr().out
    names.write_text("7.png\n")
    assert run("find_near_duplicates.py", train, "--names", names) == 0
    assert run("find_near_duplicates.py", train) == 2
    assert "there is no folder" in str(run("find_near_duplicates.py", tmp_path / "none", "--names", names))
