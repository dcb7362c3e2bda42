"""What the cells of tables hold: captions as text, bytes, lists or objects; images by name, as bytes or in base64."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

from opencoca.data.targets import from_json
from opencoca.system.messages import shown

# What base64 makes of the first bytes of JPEG, PNG, GIF, WebP, TIFF, BMP, and of HEIC and AVIF.
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkq", "TU0AK", "Qk0", "AAAA")
_DATA_URI = re.compile(r"data:[\w.+/-]{0,60};base64,")
MIN_BASE64 = 64
"""Text that is shorter is no image in base64."""
_LONGEST_NAME = 1024  # text that is longer and could be base64 is no file name
_BASE64 = re.compile(r"[A-Za-z0-9+/\s_-]+={0,2}\s*")
_CAPTION_FIELDS = ("caption", "text", "raw")
_BYTES_FIELDS = ("bytes", "data")
_PATH_FIELDS = ("path", "file_name")


def split_captions(value: Any, where: str, *, parse_json: bool = False) -> list[str]:
    """The captions that a table cell or JSON field holds, stripped; "" stands for each blank or missing one.

    A caption is text, bytes of UTF-8 text, or an object with text in its field `caption`, `text` or `raw`.

    Raises ValueError that begins with `where` for anything but captions and lists of them.
    """
    if isinstance(value, str) and value[:1] not in ("[", " "):
        return [value.strip()]
    parsed = from_json(value) if parse_json else value
    if isinstance(parsed, list) and all(item is None or isinstance(item, str) for item in parsed):
        value = parsed
    items: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    return [_caption(item, where) for item in items] or [""]


def _caption(item: Any, where: str) -> str:
    if isinstance(item, dict):
        item = next((item[field] for field in _CAPTION_FIELDS if isinstance(item.get(field), str | bytes)), item)
    if item is None or item != item:  # NaN
        return ""
    if isinstance(item, bytes):
        try:
            return item.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{where} has a caption of bytes that are not UTF-8 text ({shown(item, 60)})") from None
    if not isinstance(item, str):
        raise ValueError(f"{where} has a caption that is not text but {type(item).__name__} ({shown(item, 60)})")
    return item.strip()


def image_cells(cell: Any) -> list[Any]:
    """The images that a cell holds: the items of a list, or the cell itself."""
    cell = from_json(cell)
    return list(cell) if isinstance(cell, list | tuple) and cell else [cell]


def image_in(cell: Any) -> str | bytes | None:
    """What an image's cell holds: the name of its file, its encoded bytes, or nothing.

    An image itself is bytes, base64 text, or an object with one of these in `bytes`, whose `path` counts without it.
    Raises ValueError for base64 that can't be decoded.
    """
    if isinstance(cell, dict):
        own = next((cell[name] for name in _BYTES_FIELDS if cell.get(name)), None)
        if own is None:
            own = next((cell[name] for name in _PATH_FIELDS if isinstance(cell.get(name), str)), None)
        cell = own
    if isinstance(cell, bytes):
        return cell or None
    if not isinstance(cell, str) or not cell.strip():
        return None
    return _decoded(cell) if is_base64(cell) else cell.strip()


def holds_image(cell: Any) -> bool:
    """Tells whether a cell holds images themselves and not only their names."""
    for item in image_cells(cell):
        own = next((item[name] for name in _BYTES_FIELDS if item.get(name)), None) if isinstance(item, dict) else item
        if isinstance(own, bytes) or (isinstance(own, str) and is_base64(own)):
            return True
    return False


def is_base64(text: str) -> bool:
    """Tells whether text is an image in base64 rather than the name of a file."""
    if len(text) < MIN_BASE64:
        return False
    if _DATA_URI.match(text):
        return True
    begins_so = text.startswith(_BASE64_STARTS) or len(text) > _LONGEST_NAME
    return begins_so and _BASE64.fullmatch(text) is not None


def _decoded(text: str) -> bytes:
    start = _DATA_URI.match(text)
    plain = "".join(text[start.end() if start else 0 :].split()).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("its base64 text cannot be decoded") from None
