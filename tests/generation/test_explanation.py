"""Maps lie on the photograph where the model saw what they are about, whatever the preprocessing did to it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opencoca.data.transforms import EvalTransform, PreprocessConfig
from opencoca.generation.attention_maps import WordMaps
from opencoca.generation.explanation import Explanation, spread_over, visible_box

SIDE = 32


def bright_spot(size: tuple[int, int], at: tuple[float, float]) -> Image.Image:
    """A dark photograph with a bright disc at a place given in shares of its width and height."""
    width, height = size
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    near = np.hypot(x - at[0] * width, y - at[1] * height) < 0.1 * min(size)
    return Image.fromarray((near[..., None] * np.full(3, 255)).astype(np.uint8))


@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(90, 90), (160, 100), (70, 150)])
@pytest.mark.parametrize("at", [(0.5, 0.5), (0.4, 0.6), (0.55, 0.3)])
def test_what_the_model_sees_bright_is_bright_on_the_photograph(mode, size, at):
    """The model's own input, taken as a map, falls back onto the spot in the photograph."""
    config = PreprocessConfig((SIDE, SIDE), resize_mode=mode, mean=(0, 0, 0), std=(1, 1, 1))
    photograph = bright_spot(size, at)
    seen = EvalTransform(config)(photograph)[0]
    assert float(seen.max()) > 0.8
    laid = spread_over(seen[None], size, visible_box(size, config))[0]
    laid = laid / laid.sum()
    x = float((laid.sum(dim=0) * (torch.arange(size[0]) + 0.5)).sum()) / size[0]
    y = float((laid.sum(dim=1) * (torch.arange(size[1]) + 0.5)).sum()) / size[1]
    assert (x, y) == pytest.approx(at, abs=0.01)


def test_what_was_cut_off_is_not_looked_at():
    config = PreprocessConfig((SIDE, SIDE), resize_mode="crop")
    laid = spread_over(torch.ones(1, 4, 4), (100, 40), visible_box((100, 40), config))[0]
    assert laid.shape == (40, 100)
    torch.testing.assert_close(laid[:, 30:70], torch.ones(40, 40))
    assert float(laid[:, :30].max()) == float(laid[:, 70:].max()) == 0


def test_padding_is_not_in_the_photograph():
    config = PreprocessConfig((SIDE, SIDE), resize_mode="pad")
    assert visible_box((100, 40), config) == pytest.approx(
        (0, -9 * 40 / 13, 100, 23 * 40 / 13)
    )  # 13 of the 32 rows, from the tenth
    maps = torch.zeros(1, 10, 10)
    maps[0, :3] = 1  # above the photograph
    assert float(spread_over(maps, (100, 40), visible_box((100, 40), config))[0, 5:].max()) < 0.2


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 50), st.integers(1, 50))
def test_spreading_keeps_constants_and_orientation(rows, columns, width, height):
    box = (0.0, 0.0, float(width), float(height))
    torch.testing.assert_close(
        spread_over(torch.full((2, rows, columns), 0.3), (width, height), box), torch.full((2, height, width), 0.3)
    )
    exact = torch.rand(1, rows, columns)
    torch.testing.assert_close(spread_over(exact, (columns, rows), (0.0, 0.0, columns, rows)), exact)


def test_overlays_reach_one_and_keep_their_shape_at_any_size():
    weights = torch.zeros(2, 1, 2, 9)
    weights[:, 0, 0, 0] = 1
    weights[0, 0, 1, 8] = 1
    weights[1, 0, 1, 2] = 1
    maps = WordMaps(("a", "dog"), weights, (3, 3), torch.zeros(2))
    explanation = Explanation(Image.new("RGB", (60, 30)), "a dog", maps, (0.0, 0.0, 60.0, 30.0))
    full = explanation.overlays()
    assert full.shape == (2, 30, 60)
    torch.testing.assert_close(full.amax(dim=(1, 2)), torch.ones(2))
    assert float(full.min()) >= 0
    assert float(full[0, :10, :20].mean()) > 5 * float(full[0, 15:].mean())
    small = explanation.overlays((6, 3), layers=[0])
    assert small.shape == (2, 3, 6)
    assert float(small[1, 2, 5]) == pytest.approx(1)
    assert float(explanation.overlays((6, 3), layers=[1])[1, 0, 5]) == pytest.approx(1)
