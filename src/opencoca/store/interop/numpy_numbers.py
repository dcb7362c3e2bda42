"""Stands in for NumPy's numbers in a checkpoint: learning rates and counts that a scheduler computed with NumPy.

Nothing of NumPy's is called with what a file says: its own constructors of types take far more than numbers.
"""

import struct
from typing import Any

# How `struct` reads each of NumPy's types of numbers.
_FORMATS = {
    **{"b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q"},
    **{"f2": "e", "f4": "f", "f8": "d"},
}


class _NumberType:
    """A type of numbers, as NumPy writes it: its code, and in its state the order of bytes."""

    def __init__(self, code: Any, *_: Any):
        if code not in _FORMATS:
            raise ValueError("it holds a NumPy value that is no number")
        self.format = "<" + _FORMATS[code]

    def __setstate__(self, state: Any) -> None:
        self.format = (">" if state[1] == ">" else "<") + self.format[-1]


def _number(kind: Any, content: Any) -> bool | int | float:
    if not isinstance(kind, _NumberType) or not isinstance(content, bytes):
        raise ValueError("it holds a NumPy value that is no number")
    return struct.unpack(kind.format, content)[0]


# What takes the place of which name in a file; NumPy 1 and 2 write different ones.
NUMPY_NUMBERS = [
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]
