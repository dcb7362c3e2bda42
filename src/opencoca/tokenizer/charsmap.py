"""Checks the table of characters of a Precompiled normalizer, as SentencePiece writes it, whose sizes may be false.

The table is a trie in one array of 32-bit units, followed by the texts that its leaves point to, each ended by a zero
byte. A unit says where its children stand; a leaf, where its text begins.
"""

import base64
import binascii

import numpy as np

_LEAF, _HAS_LEAF, _FAR = np.uint32(1 << 31), np.uint32(1 << 8), np.uint32(1 << 9)


def charsmap_growth(encoded: str) -> int:
    """How many characters the table puts in the place of one, at most.

    Raises ValueError if it points anywhere outside of itself, which would end the process that reads it.
    """
    try:
        table = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("its Precompiled normalizer is no base64") from error
    size = int.from_bytes(table[:4], "little")
    units = np.frombuffer(table[4 : 4 + size], dtype="<u4") if size % 4 == 0 and 0 < size <= len(table) - 4 else None
    texts = table[4 + size :]
    if units is None or not _is_whole(units, texts):
        raise ValueError("its Precompiled normalizer points outside of its own table")
    return max(map(len, texts.decode("utf-8").split("\0")))


def _is_whole(units: np.ndarray, texts: bytes) -> bool:
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        return False
    if not texts.endswith(b"\0"):
        return False
    inner = np.flatnonzero(units & _LEAF == 0)
    offsets = (units[inner] >> np.uint32(10)) << ((units[inner] & _FAR) >> np.uint32(6))
    children = inner ^ offsets.astype(np.int64)
    if len(children) and (children | 255).max() >= len(units):
        return False
    starts = units[children[units[inner] & _HAS_LEAF != 0]] & ~_LEAF
    text_bytes = np.frombuffer(texts, dtype=np.uint8)
    return not len(starts) or bool(starts.max() < len(texts) and (text_bytes[starts] & 0xC0 != 0x80).all())
