"""The picture of explanations shows every photograph, a cell for every word, and light where the word looks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opencoca.generation.attention_maps import WordMaps
from opencoca.generation.explanation import Explanation
from opencoca.pictures.explain import LEGEND_HEIGHT, overlay, write_explanations


def explanation(words: tuple[str, ...], cell: int = 0, size: tuple[int, int] = (60, 40)) -> Explanation:
    weights = torch.zeros(1, 1, len(words), 4)
    weights[..., cell] = 1
    maps = WordMaps(words, weights, (2, 2), torch.full((len(words),), -0.5))
    return Explanation(Image.new("RGB", size, (0, 0, 200)), " ".join(words), maps, (0.0, 0.0, *map(float, size)))


def blue_pixels(path: Path) -> int:
    with Image.open(path) as sheet:
        return int((np.abs(np.asarray(sheet.convert("RGB")).astype(int) - (0, 0, 200)).max(axis=-1) < 8).sum())


def orange_pixels(path: Path) -> np.ndarray:
    """(K, 2) rows and columns of strongly lit pixels above the legend."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)[: -LEGEND_HEIGHT - 48]
    return np.argwhere((pixels[..., 0] > 130) & (pixels[..., 0] - pixels[..., 2] > 30))


def test_light_grows_with_heat() -> None:
    photograph = Image.new("RGB", (11, 1), (40, 160, 220))
    pixels = np.asarray(overlay(photograph, np.linspace(0, 1, 11)[None])).astype(int)[0]
    unlit, lit = pixels[0], pixels[-1]
    assert len(set(unlit)) == 1, "where a word does not look the photograph is grey"
    assert lit[0] > lit[2], "and orange where it looks"
    steps = np.diff(pixels[:, 0] - pixels[:, 2])
    assert (steps > 0).all()


def test_the_photograph_stays_recognisable_under_an_overlay() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3)).astype(np.uint8)
    for heat in (np.zeros((20, 20)), np.ones((20, 20))):
        shown = np.asarray(overlay(Image.fromarray(noise), heat)).astype(float).mean(axis=-1)
        assert np.corrcoef(shown.ravel(), noise.astype(float).mean(axis=-1).ravel())[0, 1] > 0.8


def test_every_word_has_a_cell_and_every_photograph_a_section(tmp_path: Path) -> None:
    one = write_explanations(tmp_path / "new" / "one.png", [explanation(("a", "dog"))])
    with Image.open(one) as sheet:
        assert (sheet.format, sheet.width) == ("PNG", 1600)
        height = sheet.height
    lit = [len(orange_pixels(write_explanations(tmp_path / "n.png", [explanation(("w",) * n)]))) for n in (1, 2, 7)]
    assert lit[0] > 1000
    assert lit[1] == pytest.approx(2 * lit[0], rel=0.02)
    assert lit[2] == pytest.approx(7 * lit[0], rel=0.02)
    two = write_explanations(tmp_path / "two.png", [explanation(("a", "dog"))] * 2, title="Title", subtitle="Below it")
    assert blue_pixels(two) == pytest.approx(2 * blue_pixels(one), rel=0.02)
    with Image.open(two) as sheet:
        assert sheet.height > 1.7 * height


def test_the_light_falls_where_the_word_looks(tmp_path: Path) -> None:
    """The four cells of the grid, each in its own quarter of the word's picture."""
    centres = [
        orange_pixels(write_explanations(tmp_path / "cell.png", [explanation(("w",), cell)])).mean(axis=0)
        for cell in range(4)
    ]
    (top_left, top_right, bottom_left, bottom_right) = centres
    for left, right in ((top_left, top_right), (bottom_left, bottom_right)):
        assert right[1] - left[1] > 50
        assert abs(right[0] - left[0]) < 10
    assert bottom_left[0] - top_left[0] > 30


@pytest.mark.parametrize("size", [(3, 400), (400, 3), (1, 1), (999, 1000)])
def test_any_shape_of_photograph(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_explanations(tmp_path / "sheet.png", [explanation(("a", "w" * 200, "dog"), size=size)])
    with Image.open(path) as sheet:
        assert sheet.width == 1600
        assert sheet.height < 3000


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        write_explanations(tmp_path / "sheet.png", [])
    with pytest.raises(ValueError, match="no layer 1"):
        write_explanations(tmp_path / "sheet.png", [explanation(("a",))], layers=[1])
    assert not (tmp_path / "sheet.png").exists()


def test_a_legend_shows_the_colours_once(tmp_path: Path) -> None:
    """From grey to orange, with the very colours of an overlay."""
    path = write_explanations(tmp_path / "sheet.png", [explanation(("a", "dog"))] * 2)
    with Image.open(path) as sheet:
        legend = np.asarray(sheet.convert("RGB")).astype(int)[-LEGEND_HEIGHT - 48 : -48]
        above = np.asarray(sheet.convert("RGB")).astype(int)[: -LEGEND_HEIGHT - 48]
    bar = np.asarray(overlay(Image.new("RGB", (220, 1), (128, 128, 128)), np.linspace(0, 1, 220)[None])).astype(int)[0]
    middle = legend[LEGEND_HEIGHT // 2]
    starts = [x for x in range(middle.shape[0] - 220) if (middle[x : x + 220] == bar).all()]
    assert len(starts) == 1
    assert not any((row[x : x + 220] == bar).all() for row in above[::8] for x in starts)
    assert (legend[:, starts[0] + 232 :] != legend[0, 0]).any(), "words stand beside it"
