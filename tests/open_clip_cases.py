"""Images and texts on which preprocessing and tokenizer are compared with open_clip's, made from nothing but code."""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image

IMAGE_SIZE = (6, 6)  # small, so that the peer's pixels can be stored whole
_EXIF_ORIENTATION = 0x0112


def encoded_images() -> dict[str, bytes]:
    """Files of many modes, sizes and shapes; all but the JPEGs decode to the same pixels everywhere."""
    rgb = _picture(40, 30)
    grey, ramp = rgb.convert("L"), Image.fromarray(np.tile(np.arange(0, 240, 6, dtype=np.uint8), (30, 1)))
    rgba = rgb.copy()
    rgba.putalpha(ramp)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette = rgb.quantize(16)
    images = {
        "rgb": _encode(rgb),
        "grey": _encode(grey),
        "one bit": _encode(rgb.convert("1")),
        "palette": _encode(palette),
        "palette, transparent": _encode(palette, transparency=3),
        "palette with alpha": _encode(rgba.quantize(16)),
        "rgba": _encode(rgba),
        "rgb with a transparent colour": _encode(rgb, transparency=(0, 0, 0)),
        "grey with alpha": _encode(Image.merge("LA", (grey, ramp))),
        "16 bit": _encode(deep),
        "cmyk": _encode(rgb.convert("CMYK"), "TIFF"),
        "float": _encode(Image.fromarray(np.asarray(grey, dtype=np.float32) / 255), "TIFF"),
        "gif": _encode(palette, "GIF"),
    }
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = 6
    images["exif rotated"] = _encode(rgb, exif=exif)
    for size in ((1, 1), (2, 3), (5, 7), (6, 6), (7, 6), (13, 6), (50, 3), (3, 120), (200, 2), (333, 500)):
        images[f"{size[0]} x {size[1]}"] = _encode(_picture(*size))
    return images


def texts(count: int, seed: int = 0) -> list[str]:
    """Random texts of words, entities, mojibake, every kind of whitespace, control characters, scripts and emoji."""
    rng = random.Random(seed)
    return [_text(rng) for _ in range(count)]


_WORDS = [
    *("a", "dog", "dog's", "DON'T", "I'll", "café", "naïve", "straße", "ΣΊΣΥΦΟΣ", "ǅ", "İstanbul", "ﬁnd"),
    *("ﬂag", "ＦＵＬＬ", "ｶﾀｶﾅ", "'S", "it'ſ", "“quoted”", "‘x’", "scho\u0308n", "½", "²", "①", "x2", "12345"),
    *(
        "!?...",
        "---",
        "♥️",
        "\ud83d\ude00",
        "👩‍👩‍👧",
        "🇩🇪",
        "한국어",
        "日本語",
        "नमस्ते",
        "مرحبا",
        "\x1b[31mred\x1b[0m",
        "α\u0345",
    ),
]
_ENTITIES = [
    *("&amp;", "&lt;", "&gt;", "&quot;", "&#39;", "&nbsp;", "&eacute;", "&amp;amp;", "&#x1F600;", "&#128;"),
    *("&#0;", "&nothing;", "&amp;lt;", "&hearts", "&#xD800;", "&Ntilde;", "&HELLIP;"),
]
_MISREAD = ["café", "schön – gut", "“hi”", "日本", "naïve €5", "Привет", "😀"]
_SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u200b", "\u2028", "\x85", "\x1c", "\u3000", "\ufeff"]
_BLOCKS = [
    *((0x20, 0x7E), (0xA0, 0x17F), (0x180, 0x24F), (0x250, 0x2FF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F)),
    *((0x5D0, 0x6D3), (0x904, 0x939), (0xE01, 0xE30), (0x10A0, 0x10C5), (0x1E00, 0x1FFF), (0x2000, 0x206F)),
    *((0x2070, 0x208E), (0x2100, 0x23FF), (0x2460, 0x27BF), (0x3041, 0x30FF), (0x3400, 0x9FFF), (0xAC00, 0xD7A3)),
    *((0xDC00, 0xDFFF), (0xE000, 0xF8FF), (0xFB00, 0xFB06), (0xFE00, 0xFFFF), (0x1D400, 0x1D6A5)),
    *((0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE0000, 0xE01EF), (0, 0x1F), (0x7F, 0x9F)),
]
"""Blocks whose letters are older than every library's Unicode tables; of surrogates the second halves alone."""


def _text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(0, 12)):
        kind = rng.random()
        if kind < 0.3:
            parts.append(rng.choice(_WORDS))
        elif kind < 0.4:
            parts.append(rng.choice(_ENTITIES))
        elif kind < 0.5:
            parts.append(_misread(rng))
        elif kind < 0.6:
            parts.append(rng.choice(_SPACES))
        elif kind < 0.62:
            parts.append(rng.choice("abcé犬") * rng.randint(30, 90))
        else:
            first, last = rng.choice(_BLOCKS)
            parts.append("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8))))
        if rng.random() < 0.6:
            parts.append(rng.choice(_SPACES) if rng.random() < 0.3 else " ")
    return "".join(parts)


def _misread(rng: random.Random) -> str:
    text = rng.choice(_MISREAD)
    for encoding in rng.sample(["latin-1", "cp1252", "cp1251", "cp437", "mac-roman"], 5):
        try:
            return text.encode("utf-8").decode(encoding)
        except UnicodeDecodeError:
            continue
    return text


def _picture(width: int, height: int) -> Image.Image:
    """Smooth colours with sharp edges between them."""
    rows, columns = np.mgrid[0:height, 0:width]
    checks = ((rows * 4 // height + columns * 5 // width) % 2) * 60
    red, green = 190 * columns // width + checks, 190 * rows // height + checks
    blue = np.abs(120 - (37 * columns + 11 * rows) % 240) + checks
    return Image.fromarray(np.stack((red, green, blue), axis=-1).astype(np.uint8))


def _encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()
