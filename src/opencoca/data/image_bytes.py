"""Takes out of the bytes of an image file what is not needed for the picture and could do harm to its decoder.

Pillow unpacks texts and colour profiles of a PNG, and gives up if they are large; it passes over fill bytes of a JPEG
one at a time.
"""

from __future__ import annotations

import re
import zlib

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PICTURE_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"})
# Texts that may say which side is up.
_ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MAX_TEXT_BYTES = 1 << 20
_MAX_CHUNKS = 200_000

_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")
_START_OF_SCAN = 0xDA
_MAX_SEGMENTS = 20_000
_MAX_SCANS = 256


def clean_bytes(data: bytes) -> bytes:
    """The same picture in as many bytes or fewer. Raises ValueError for files that would take very long to open."""
    if data.startswith(_PNG_MAGIC):
        return _clean_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _clean_jpeg(data)
    return data


def _clean_png(data: bytes) -> bytes:
    """The chunks that make the picture; an animation's further frames are left out too."""
    view, pieces, position = memoryview(data), [memoryview(_PNG_MAGIC)], len(_PNG_MAGIC)
    for _ in range(_MAX_CHUNKS):
        length, kind = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        end = position + 12 + length
        if len(kind) < 4 or end > len(data):
            pieces.append(view[position:])  # what is cut short is left to the decoder
            break
        if kind in _PICTURE_CHUNKS or (kind in (b"tEXt", b"zTXt", b"iTXt") and _tells_orientation(data, position)):
            pieces.append(view[position:end])
        position = end
        if kind == b"IEND":
            break
    else:
        raise ValueError(f"it has more than {_MAX_CHUNKS:,} parts (PNG chunks)")
    return b"".join(pieces)


def _tells_orientation(data: bytes, position: int) -> bool:
    """Tells whether a PNG's text chunk may name the orientation and does not unpack to very much."""
    start, length = position + 8, int.from_bytes(data[position : position + 4])
    if length > _MAX_TEXT_BYTES or not data.startswith(_ORIENTATION_TEXTS, start):
        return False
    _, _, rest = data[start : start + length].partition(b"\0")
    kind = data[position + 4 : position + 8]
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return True
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, _MAX_TEXT_BYTES)
    except zlib.error:
        return False
    return not unpacking.unconsumed_tail


def _clean_jpeg(data: bytes) -> bytes:
    """The segments up to the first scan without what lies between them, and all that follows."""
    pieces, kept, position = [], 0, 2  # all before `kept` is in pieces
    for _ in range(_MAX_SEGMENTS):
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            break
        if found.start() > position:
            pieces.append(data[kept:position])
            kept = found.start()
        marker = found[1][0]
        if marker == _START_OF_SCAN:
            if data.count(b"\xff\xda", found.start()) > _MAX_SCANS:
                raise ValueError(f"it has more than {_MAX_SCANS} scans")
            break
        if marker < 0xC0:
            break  # no JPEG has this; left to the decoder
        alone = 0xD0 <= marker <= 0xD9
        length = 0 if alone else int.from_bytes(data[found.end() : found.end() + 2])
        position = found.end() + length
        if not alone and (length < 2 or position > len(data)):
            break
    else:
        raise ValueError(f"it has more than {_MAX_SEGMENTS:,} parts (JPEG segments)")
    return b"".join([*pieces, data[kept:]]) if pieces else data
