"""Draws photographs with captions and labels, and text queries with the photographs that they found."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from opencoca.inference.labels import LabelScore
from opencoca.inference.preprocess import ImageLike, as_pil
from opencoca.pictures.drawing import (
    ACCENT,
    CARD_FILL,
    INK,
    PAPER,
    SOFT,
    TRACK,
    font,
    font_for,
    framed,
    save_sheet,
    shortened,
    stacked,
    text_block,
)

_WIDTH, _MARGIN, _GAP, _PADDING = 1600, 48, 24, 18
_COLUMNS = 4
_CARD = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) // _COLUMNS
_PHOTO_HEIGHT = _CARD * 3 // 4

UNSURE_BELOW = 0.5
"""The confidence below which a caption is more probably wrong than right."""


@dataclass(frozen=True)
class Photograph:
    """An image, its caption, and its most probable labels, the best first.

    confidence: the probability that the caption is right, where it is known (see `GeneratedCaption.confidence`).
    """

    image: ImageLike
    caption: str
    labels: Sequence[LabelScore] = ()
    confidence: float | None = None

    @property
    def is_unsure(self) -> bool:
        """Whether the caption is probably wrong, so that it should not be shown as a fact."""
        return self.confidence is not None and self.confidence < UNSURE_BELOW


@dataclass(frozen=True)
class Finding:
    """A text query, the image that is most similar to it, and their cosine, -1 to 1."""

    query: str
    image: ImageLike
    similarity: float


def write_contact_sheet(
    path: str | os.PathLike[str],
    photographs: Sequence[Photograph],
    findings: Sequence[Finding] = (),
    *,
    title: str = "",
    subtitle: str = "",
) -> Path:
    """Draws a PNG, 1600 pixels wide, and returns its path. Captions of a confidence below `UNSURE_BELOW` are grey.

    Raises:
        ValueError: there is nothing to draw, or an image cannot be used (ImageError).
        WriteError: the file cannot be written.
    """
    if not photographs and not findings:
        raise ValueError("a contact sheet needs at least one photograph or finding")
    cards = [_photograph_card(photograph) for photograph in photographs]
    found = [_finding_card(finding) for finding in findings]
    inner = _WIDTH - 2 * _MARGIN
    heading = [text_block(title, font(38, bold=True), INK, inner)] if title else []
    heading += [text_block(subtitle, font(20), SOFT, inner)] if subtitle else []
    sections = [stacked(heading, inner, PAPER)] if heading else []
    sections += _rows(cards)
    if found:
        sections += [text_block("Found by text", font(26, bold=True), INK, inner), *_rows(found)]
    return save_sheet(path, stacked(sections, _WIDTH, PAPER, _GAP, _MARGIN))


def _rows(cards: Sequence[Image.Image]) -> list[Image.Image]:
    """Puts cards side by side; all cards of a row are as tall as its tallest."""
    rows = []
    for start in range(0, len(cards), _COLUMNS):
        group = cards[start : start + _COLUMNS]
        height = max(card.height for card in group)
        row = Image.new("RGB", (_WIDTH - 2 * _MARGIN, height), PAPER)
        for column, card in enumerate(group):
            row.paste(framed(card, height), (column * (_CARD + _GAP), 0))
        rows.append(row)
    return rows


def _photograph_card(photograph: Photograph) -> Image.Image:
    inner = _CARD - 2 * _PADDING
    colour = SOFT if photograph.is_unsure else INK
    parts = [text_block(photograph.caption or "(no words)", font(21), colour, inner, CARD_FILL)]
    if photograph.is_unsure:
        parts.append(text_block(f"unsure ({photograph.confidence:.0%})", font(17, bold=True), SOFT, inner, CARD_FILL))
    parts += [_label_bar(label, inner) for label in photograph.labels]
    return _card(photograph.image, parts)


def _finding_card(finding: Finding) -> Image.Image:
    inner = _CARD - 2 * _PADDING
    query = text_block(f"“{finding.query}”", font(21, bold=True), ACCENT, inner, CARD_FILL)
    score = text_block(f"similarity {finding.similarity:.3f}", font(17), SOFT, inner, CARD_FILL)
    return _card(finding.image, [query, score])


def _card(image: ImageLike, parts: Sequence[Image.Image]) -> Image.Image:
    photo = _covering(as_pil(image), (_CARD, _PHOTO_HEIGHT))
    return stacked([photo, stacked(parts, _CARD, CARD_FILL, gap=10, margin=_PADDING)], _CARD, CARD_FILL)


def _covering(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Shows the whole image on a blurred copy of itself: nothing is cut off, and no empty bars are left."""
    across, down = size[0] / image.width, size[1] / image.height
    scale = min(across, down)
    if scale > 0.85 * max(across, down):  # nearly the same shape: a crop loses little
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    small = ImageOps.fit(image, (max(1, size[0] // 24), max(1, size[1] // 24)), Image.Resampling.LANCZOS)
    background = small.resize(size, Image.Resampling.BICUBIC)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    place = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    background.paste(image.resize(inner, Image.Resampling.LANCZOS), place)
    return background


def _label_bar(label: LabelScore, width: int) -> Image.Image:
    small = font(17)
    height, bar_height = 38, 7
    part = Image.new("RGB", (width, height), CARD_FILL)
    draw = ImageDraw.Draw(part)
    percent = f"{label.probability:.0%}"
    draw.text((width, 0), percent, SOFT, small, anchor="ra")
    own = font_for(label.label, small)
    name = shortened(label.label, own, width - small.getlength(percent) - 16)
    draw.text((0, 0), name, INK, own, anchor="la")
    top = height - bar_height - 2
    draw.rounded_rectangle((0, top, width - 1, top + bar_height), bar_height / 2, fill=TRACK)
    filled = round((width - 1) * min(1.0, max(0.0, label.probability)))
    if filled >= bar_height:
        draw.rounded_rectangle((0, top, filled, top + bar_height), bar_height / 2, fill=ACCENT)
    return part
