"""How values that somebody else chose (names, cells, errors of libraries) appear in messages: short and on one line."""

import reprlib

_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = _VALUES.maxlong = 80


def shown(value: object, most: int = 80) -> str:
    """Writes a value as Python would: in quotes, control characters escaped, with at most `most` characters.

    What is longer loses its middle; of nested values a few items are shown.
    """
    if not isinstance(value, str | bytes):
        return _shorten(_VALUES.repr(value), most)
    if isinstance(value, str):
        return _shorten(repr(value if len(value) <= 2 * most else value[:most] + value[-most:]), most)
    return _shorten(repr(value[: 2 * most]), most)


def brief(message: object, most: int = 120) -> str:
    """The text of another message, on one line, with at most `most` characters, control characters escaped."""
    text, reach = str(message), 10 * most  # of a very long one, only its ends are looked at
    text = text if len(text) <= 2 * reach else text[:reach] + text[-reach:]
    return _shorten(escaped(" ".join(text.split())), most)


def escaped(name: str) -> str:
    """A name as it is, but for what a terminal would act on: line breaks and control characters, written as escapes."""
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in name)


def _shorten(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = (most - 3) // 2
    return f"{text[: most - 3 - end]}...{text[-end:]}"
