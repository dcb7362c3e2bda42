"""The parts of all pictures: colours, fonts, blocks of text, cards with round corners."""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from opencoca.system.files import atomic_write
from opencoca.system.fonts import font_file

PAPER, CARD_FILL, BORDER = "#f3f1ec", "#ffffff", "#dedad1"
INK, SOFT, ACCENT, TRACK = "#22211f", "#77736b", "#c2562d", "#efece5"
_RADIUS = 14


def framed(card: Image.Image, height: int) -> Image.Image:
    """Extends a card to this height, with smooth round corners and a border (drawn large and shrunk)."""
    full = Image.new("RGB", (card.width, height), CARD_FILL)
    full.paste(card, (0, 0))
    scale = 4
    size = (card.width * scale, height * scale)
    mask, border = Image.new("L", size, 0), Image.new("L", size, 0)
    corners = (0, 0, size[0] - 1, size[1] - 1)
    ImageDraw.Draw(mask).rounded_rectangle(corners, _RADIUS * scale, fill=255)
    ImageDraw.Draw(border).rounded_rectangle(corners, _RADIUS * scale, outline=255, width=scale + scale // 2)
    result = Image.new("RGB", full.size, PAPER)
    result.paste(full, mask=mask.resize(full.size, Image.Resampling.LANCZOS))
    result.paste(BORDER, mask=border.resize(full.size, Image.Resampling.LANCZOS))
    return result


def text_block(
    text: str, font: ImageFont.FreeTypeFont, colour: str, width: int, background: str = PAPER
) -> Image.Image:
    """Draws a text of this width, on as many lines as it takes."""
    font = font_for(text, font)
    lines = wrapped(text, font, width)
    step = round(font.size * 1.35)
    block = Image.new("RGB", (width, step * len(lines)), background)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        draw.text((0, number * step), line, colour, font, anchor="la")
    return block


def stacked(parts: Sequence[Image.Image], width: int, fill: str, gap: int = 0, margin: int = 0) -> Image.Image:
    """Puts pictures below one another, with a gap between them and a margin on all sides."""
    height = 2 * margin + sum(part.height for part in parts) + gap * (len(parts) - 1)
    whole = Image.new("RGB", (width, height), fill)
    y = margin
    for part in parts:
        whole.paste(part, (margin, y))
        y += part.height + gap
    return whole


def save_sheet(path: str | os.PathLike[str], sheet: Image.Image) -> Path:
    """Writes a picture as a PNG and returns its path."""
    with atomic_write(path) as partial:
        sheet.save(partial, "PNG")
    return Path(path)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Breaks a text into lines of at most this width; a single word that is wider is shortened."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif lines[-1]:
            lines.append(shortened(word, font, width))
        else:
            lines[-1] = shortened(word, font, width)
    return lines


def shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cuts a text that is wider than this, and ends it with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns DejaVu, which comes with matplotlib, so that pictures are the same on every machine."""
    return ImageFont.truetype(font_file(bold=bold), size)


def font_for(text: str, usual: ImageFont.FreeTypeFont) -> ImageFont.FreeTypeFont:
    """Returns the usual font if it has all characters of a text, else another one that has more of them."""
    file = font_file(text, bold="Bold" in str(usual.path))
    return usual if file == usual.path else ImageFont.truetype(file, usual.size)
