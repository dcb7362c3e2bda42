"""Tells which regular expressions of a tokenizer.json are safe to run: those that no text can make slow.

A repetition inside of a repetition, or many in a row, takes a time that grows with a power of the text's length. Only
patterns are accepted in which, from every character, the search tries about as many ways as the text is long.
"""

import re

_MAX_LENGTH, _MAX_CHOICES = 1000, 3
# One character of the text: a class in brackets, an escape, or the character itself.
_ESCAPE = r"\\(?:[pP]\{\^?\w{1,40}\}|x\{[0-9a-fA-F]{1,6}\}|x[0-9a-fA-F]{2}|[sSdDwWrnt]|[^\w\s])"
_CHARACTER = rf"(?:\[\^?(?:{_ESCAPE}|[^\[\]\\&])+\]|{_ESCAPE}|[^\\\[\](){{}}?*+|^$])"
_PLACE = r"(?:[\^$]|\\[AzZbB])"
# What stands at one place of the pattern: a view ahead or back, alternatives of plain characters, or a character.
_ITEM = re.compile(
    rf"(?P<place>{_PLACE}|\(\?<?[=!]{_CHARACTER}\))"
    rf"|(?P<one>{_CHARACTER}|\((?:\?i?:)?{_CHARACTER}+(?:\|{_CHARACTER}+)*\))"
    r"(?P<repeated>[?*+][?+]?|\{\d{1,2}(?:,\d{0,2})?\})?"
)
_GROUP_REPEATED = ("", "?", "??", "?+")


def is_safe_pattern(pattern: str) -> bool:
    """Whether every search for this pattern ends soon, whatever the text. Says no to all that it does not know."""
    if not 0 < len(pattern) <= _MAX_LENGTH:
        return False
    kinds, position = "", 0
    while position < len(pattern):
        if pattern[position] == "|":
            kinds, position = kinds + "|", position + 1
            continue
        item = _ITEM.match(pattern, position)
        if item is None:
            return False
        kinds, position = kinds + _kind(item), item.end()
    return "x" not in kinds and all(map(_is_quick, kinds.split("|")))


def _kind(item: re.Match[str]) -> str:
    """One letter: must, choice (there or not, or a few times), unbounded; x for what is refused."""
    repeated = item["repeated"] or ""
    if item["place"] or not repeated:
        return "m"
    if item["one"].startswith("(") and repeated not in _GROUP_REPEATED:
        return "x"
    if repeated[0] in "*+" or re.search(r",(\d\d)?\}", repeated):  # up to ten or more times counts as without end
        return "u"
    return "m" if repeated[0] == "{" and "," not in repeated else "c"


def _is_quick(kinds: str) -> bool:
    """At most one unbounded repetition, or a second one behind which nothing can fail."""
    return kinds.count("c") <= _MAX_CHOICES and re.fullmatch(r"[mc]*(?:u[mc]*)?(?:uc*)?", kinds) is not None
