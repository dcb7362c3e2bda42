"""Draws explanations: each photograph with its caption, and beside it one overlay for each word.

The photograph is pale and grey where a word does not look, and orange where it looks most; a legend says so.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from opencoca.generation.explanation import Explanation
from opencoca.pictures.drawing import CARD_FILL, INK, PAPER, SOFT, font, framed, save_sheet, stacked, text_block

_WIDTH, _MARGIN, _GAP, _CELL_GAP, _PADDING = 1600, 48, 40, 14, 14
_COLUMNS = 5
_LEFT = 460
_CELL = (_WIDTH - 2 * _MARGIN - _LEFT - _GAP - (_COLUMNS - 1) * _CELL_GAP) // _COLUMNS
_TALLEST = 1.5  # height over width of a photograph that is shown whole; taller ones are made smaller
_FADED = 0.62  # how far the photograph fades to white where a word does not look
_GLOW = np.array([240, 90, 10], dtype=np.float32)
_GLOW_SHARE = 0.65
_GAMMA = 0.7  # below 1: weak attention is visible too
LEGEND_HEIGHT = 26
_LEGEND_GREY = (128, 128, 128)


def write_explanations(
    path: str | os.PathLike[str],
    explanations: Sequence[Explanation],
    *,
    layers: Sequence[int] | None = None,
    title: str = "",
    subtitle: str = "",
) -> Path:
    """Draws a PNG, 1600 pixels wide, one section for each photograph, and returns its path.

    layers: the layers of the multimodal decoder whose maps are averaged; None: all; -1: the last.

    Raises:
        ValueError: nothing to draw, or a layer that the decoder does not have.
        WriteError: the file cannot be written.
    """
    if not explanations:
        raise ValueError("there is nothing to draw; give at least one explanation")
    inner = _WIDTH - 2 * _MARGIN
    sections = [text_block(title, font(38, bold=True), INK, inner)] if title else []
    sections += [text_block(subtitle, font(20), SOFT, inner)] if subtitle else []
    sections += [_section(explanation, layers) for explanation in explanations]
    sections.append(_legend())
    return save_sheet(path, stacked(sections, _WIDTH, PAPER, _GAP, _MARGIN))


def overlay(photograph: Image.Image, heat: np.ndarray) -> Image.Image:
    """Lays heat (height, width), 0 to 1 and of the photograph's size, over an RGB photograph."""
    pixels = np.asarray(photograph, dtype=np.float32)
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    unlit = ((1 - _FADED) * grey + _FADED * 255)[..., None]
    lit = (1 - _GLOW_SHARE) * pixels + _GLOW_SHARE * _GLOW
    share = (heat.astype(np.float32) ** _GAMMA)[..., None]
    return Image.fromarray((unlit + share * (lit - unlit)).clip(0, 255).round().astype(np.uint8))


def _legend() -> Image.Image:
    """The colours from where a word does not look to where it looks most, and what the percentages are."""
    small = font(17)
    left, bar, right = (
        text_block("does not look here", small, SOFT, 164),
        overlay(Image.new("RGB", (220, 18), _LEGEND_GREY), np.linspace(0, 1, 220)[None].repeat(18, axis=0)),
        text_block("looks here most  ·  %: how probable the word was for the model", small, SOFT, 700),
    )
    legend = Image.new("RGB", (_WIDTH - 2 * _MARGIN, LEGEND_HEIGHT), PAPER)
    x = _LEFT + _GAP
    for part in (left, bar, right):
        legend.paste(part, (x, (LEGEND_HEIGHT - part.height) // 2))
        x += part.width + 12
    return legend


def _section(explanation: Explanation, layers: Sequence[int] | None) -> Image.Image:
    photograph = explanation.photograph
    caption = text_block(explanation.caption, font(22), INK, _LEFT - 2 * _PADDING, CARD_FILL)
    left = _card(_shown(photograph, _LEFT), caption, _LEFT)
    small = _shown(photograph, _CELL)
    heats = explanation.overlays(small.size, layers).numpy()
    cells = []
    for word, heat, log_prob in zip(explanation.maps.words, heats, explanation.maps.log_probs.tolist(), strict=True):
        name = text_block(word, font(18, bold=True), INK, _CELL - 2 * _PADDING, CARD_FILL)
        chance = text_block(f"{np.exp(log_prob):.0%}", font(14), SOFT, _CELL - 2 * _PADDING, CARD_FILL)
        cells.append(_card(overlay(small, heat), stacked([name, chance], name.width, CARD_FILL), _CELL))
    rows = -(-len(cells) // _COLUMNS)
    height = max(left.height, rows * (cells[0].height + _CELL_GAP) - _CELL_GAP)
    section = Image.new("RGB", (_WIDTH - 2 * _MARGIN, height), PAPER)
    section.paste(framed(left, left.height), (0, 0))
    for number, cell in enumerate(cells):
        row, column = divmod(number, _COLUMNS)
        x = _LEFT + _GAP + column * (_CELL + _CELL_GAP)
        section.paste(framed(cell, cells[0].height), (x, row * (cells[0].height + _CELL_GAP)))
    return section


def _shown(photograph: Image.Image, width: int) -> Image.Image:
    """Scales the photograph to this width, or to the largest allowed height."""
    scale = min(width / photograph.width, _TALLEST * width / photograph.height)
    size = max(1, round(photograph.width * scale)), max(1, round(photograph.height * scale))
    return photograph.resize(size, Image.Resampling.LANCZOS)


def _card(picture: Image.Image, below: Image.Image, width: int) -> Image.Image:
    card = Image.new("RGB", (width, picture.height + below.height + 2 * _PADDING), CARD_FILL)
    card.paste(picture, ((width - picture.width) // 2, 0))
    card.paste(below, (_PADDING, picture.height + _PADDING))
    return card
