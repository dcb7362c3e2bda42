"""The contact sheet shows every photograph, its labels' bars, and never more than fits."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opencoca.inference.labels import LabelScore
from opencoca.pictures import contact_sheet, drawing
from opencoca.pictures.contact_sheet import Finding, Photograph, write_contact_sheet

COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 10, 250), (10, 250, 250)]


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    """Pixels close to a colour."""
    return int((np.abs(np.asarray(sheet).astype(int) - colour).max(axis=-1) <= 8).sum())


def test_every_photograph_is_shown_as_large_as_the_others(tmp_path: Path) -> None:
    photographs = [Photograph(plain(colour), "a caption") for colour in COLOURS]
    findings = [Finding("a query", plain(COLOURS[0]), 0.5)]
    path = write_contact_sheet(tmp_path / "new" / "sheet.png", photographs, findings, title="A title")
    with Image.open(path) as sheet:
        assert (sheet.format, sheet.width) == ("PNG", 1600)
        areas = [count(sheet.convert("RGB"), colour) for colour in COLOURS]
    assert areas[0] == pytest.approx(2 * areas[1], rel=0.02)
    assert areas[1:] == pytest.approx([areas[1]] * 4, rel=0.02)
    assert areas[1] > 50_000


def test_bars_are_as_long_as_the_labels_are_probable(tmp_path: Path) -> None:
    def bar(probability: float) -> int:
        photograph = Photograph(plain((0, 0, 255)), "", [LabelScore("a label", probability)])
        with Image.open(write_contact_sheet(tmp_path / "sheet.png", [photograph])) as sheet:
            return count(sheet.convert("RGB"), (0xC2, 0x56, 0x2D))

    assert bar(0.0) == 0
    assert bar(0.5) == pytest.approx(bar(1.0) / 2, rel=0.05)
    assert bar(0.25) == pytest.approx(bar(1.0) / 4, rel=0.05)


@pytest.mark.parametrize("size", [(300, 300), (100, 400), (2000, 3), (1, 1), (407, 305)])
def test_the_whole_of_an_image_is_shown_whatever_its_shape(tmp_path: Path, size: tuple[int, int]) -> None:
    """The left half is red and the right half green; both must be seen, alike."""
    image = plain((255, 0, 0), size)
    image.paste((0, 255, 0), (size[0] // 2, 0, size[0], size[1]))
    with Image.open(write_contact_sheet(tmp_path / "sheet.png", [Photograph(image, "")])) as sheet:
        red, green = count(sheet.convert("RGB"), (255, 0, 0)), count(sheet.convert("RGB"), (0, 255, 0))
    assert green > 0
    if size[0] > 1:
        assert red == pytest.approx(green, rel=0.1)


@given(st.text(max_size=80), st.integers(20, 400))
def test_wrapped_lines_fit_and_lose_no_word_that_fits(text: str, width: int) -> None:
    font = drawing.font(17)
    lines = drawing.wrapped(text, font, width)
    assert all(font.getlength(line) <= width or line == "…" for line in lines)
    if all(font.getlength(word) <= width for word in text.split()):
        assert " ".join(lines).split() == text.split()


def test_long_words_do_not_leave_their_card(tmp_path: Path) -> None:
    def draw(words: str) -> np.ndarray:
        photographs = [
            Photograph(plain((0, 0, 255)), words, [LabelScore(words, 0.5)]),
            Photograph(plain((9, 9, 9)), "b"),
        ]
        with Image.open(write_contact_sheet(tmp_path / "sheet.png", photographs)) as sheet:
            return np.asarray(sheet.convert("RGB"))

    short, long = draw("a"), draw("w" * 300)
    assert short.shape == long.shape
    changed = np.abs(short.astype(int) - long).max(axis=(0, 2)).nonzero()[0]
    assert 0 < changed.max() < 48 + contact_sheet._CARD


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_contact_sheet(tmp_path / "sheet.png", [])
    with pytest.raises(ValueError, match="no such file"):
        write_contact_sheet(tmp_path / "sheet.png", [Photograph(tmp_path / "no.jpg", "")])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*sheet\.png"):
        write_contact_sheet(tmp_path / "file" / "sheet.png", [Photograph(plain((0, 0, 0)), "")])


def test_a_caption_that_is_probably_wrong_is_grey_and_says_so(tmp_path: Path) -> None:
    def draw(confidence: float | None) -> tuple[int, int]:
        """How much is drawn in the colour of captions, and how tall the sheet is."""
        photograph = Photograph(plain((0, 0, 255)), "a dog runs over the grass", confidence=confidence)
        with Image.open(write_contact_sheet(tmp_path / "sheet.png", [photograph])) as sheet:
            return count(sheet.convert("RGB"), (0x22, 0x21, 0x1F)), sheet.height

    unknown, sure, unsure = draw(None), draw(contact_sheet.UNSURE_BELOW), draw(contact_sheet.UNSURE_BELOW - 0.01)
    assert sure == unknown
    assert unknown[0] > 100
    assert unsure[0] == 0
    assert unsure[1] > unknown[1]
