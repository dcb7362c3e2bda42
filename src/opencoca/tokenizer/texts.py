"""Prepares texts for the tokenizers: strings that can be written as UTF-8."""

import re

_SURROGATE_PAIR, _SURROGATE = re.compile("[\ud800-\udbff][\udc00-\udfff]"), re.compile("[\ud800-\udfff]")


def require_text(text: object, position: int) -> str:
    """Returns `text` as a string that can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"text number {position} is {text!r}, not a string; remove it or fill it in")
    return without_surrogates(text)


def without_surrogates(text: str) -> str:
    """Replaces surrogates, which JSON may hold: pairs by the characters that they encode, others by U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        paired = _SURROGATE_PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
        return _SURROGATE.sub("\ufffd", paired)
