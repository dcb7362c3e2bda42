"""Which font draws a text."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from opencoca.pictures.drawing import font, text_block
from opencoca.system import fonts
from opencoca.system.fonts import font_file


def make_font(path: Path, characters: str) -> str:
    """A font in which each of these characters is a black square."""
    names = [".notdef", *(f"g{number}" for number in range(len(characters)))]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(dict(zip(map(ord, characters), names[1:], strict=True)))
    builder.setupGlyf({name: empty if name == ".notdef" else square for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The fonts of a machine: one that cannot be read, one with few characters, one with more."""
    (tmp_path / "a.ttf").write_bytes(b"no font")
    found = {name: make_font(tmp_path / f"{name}.ttf", text) for name, text in (("few", "一 "), ("more", "一杯 "))}
    monkeypatch.setattr(fonts, "_installed", lambda: (str(tmp_path / "a.ttf"), *found.values()))
    monkeypatch.setattr(fonts, "_useful", [])
    fonts._with_most.cache_clear()
    yield found
    fonts._with_most.cache_clear()


def test_the_font_that_has_the_most(installed: dict[str, str]) -> None:
    usual = font_file()
    assert usual.endswith("DejaVuSans.ttf")
    assert font_file("a cat, привет\n", bold=True).endswith("DejaVuSans-Bold.ttf")
    assert font_file("一") == installed["few"]
    assert font_file("一杯") == installed["more"]
    assert font_file("a long text with one 杯") == usual, "of which no other font has more"
    assert font_file("\U00020000") == usual, "which none has"


def test_pictures_draw_with_it(installed: dict[str, str]) -> None:
    black = text_block("一杯", font(20), "#000000", 100, "#ffffff").convert("1").histogram()[0]
    assert black == pytest.approx(2 * 16 * 16, rel=0.1), "two squares of 0.8 x 20 pixels"


def test_no_warning_about_characters_that_no_font_has() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_block("\U00020000", font(20), "#000000", 100)
