"""Targets: the class of a sample, or answers with weights, out of tables, shards and folders."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from opencoca.system.messages import shown

Target = str | Mapping[str, float]
"""The name of a class; or answers, each with its weight from 0 to 1."""

# Lists of texts and weights of texts as Python and numpy print them: ['a', "it's"], ['a' 'b'], {'yes': 0.5}
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_NUMBER = r"[0-9.eE+-]+"
_PRINTED_LIST = re.compile(rf"\[(?:[\s,]*(?:{_QUOTED}|None|nan))+[\s,]*\]", re.DOTALL)
_PRINTED_WEIGHTS = re.compile(rf"\{{(?:[\s,]*{_QUOTED}\s*:\s*{_NUMBER})+[\s,]*\}}", re.DOTALL)


def parse_target(value: Any, where: str, *, parse_json: bool = False) -> Target | None:
    """The target that a table cell or JSON field holds; None for a blank or missing one.

    Text is a class, and so is a whole number. A list names several answers: the weight of each is its share of the
    list, and a list of one name, however often, is that class. A mapping gives weights itself.

    Args:
        value: what the cell or field holds.
        where: where that is, for messages.
        parse_json: whether text that is a list or object counts as one, as in a CSV; see `from_json`.

    Raises ValueError that begins with `where` for anything else.
    """
    if parse_json:
        value = from_json(value)
    if isinstance(value, Mapping):
        return _weights(value.items(), where)
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, tuple) and len(item) == 2 for item in value):  # a map of a Parquet file
            return _weights(value, where)
        return shares([name for item in value if (name := _name(item, where))])
    return _name(value, where) or None


def from_json(value: Any) -> Any:
    """Parses the text of a cell if it is a list or object, in JSON or as Python prints it; else returns the value."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value)
    text = value.strip()
    if _PRINTED_LIST.fullmatch(text):
        return [_unquoted(item) for item in re.findall(rf"{_QUOTED}|None|nan", text, re.DOTALL)]
    if _PRINTED_WEIGHTS.fullmatch(text):
        with contextlib.suppress(ValueError):
            pairs = re.findall(rf"({_QUOTED})\s*:\s*({_NUMBER})", text, re.DOTALL)
            return {_unquoted(name): float(weight) for name, weight in pairs}
    return value


def _unquoted(item: str) -> str | None:
    """The text between quotation marks, with Python's escapes undone; None for `None` and `nan`."""
    if item in ("None", "nan"):
        return None
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), item[1:-1], flags=re.DOTALL)


def shares(names: Sequence[str]) -> Target | None:
    """The target that a list of names stands for: each weighs its share of the list; one name alone is a class."""
    counts = Counter(names)
    if len(counts) <= 1:
        return next(iter(counts), None)
    return {name: count / len(names) for name, count in counts.items()}


def target_names(target: Target | None) -> tuple[str, ...]:
    """The class, or the answers in the order in which they are stored; () for no target."""
    if target is None:
        return ()
    return (target,) if isinstance(target, str) else tuple(target)


def class_folder(key: str) -> str | None:
    """The name of the folder that an image lies in; None if it lies in no folder."""
    return PurePosixPath(key).parent.name or None


def _name(value: Any, where: str) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode().strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    kind = type(value).__name__
    raise ValueError(f"{where} has a label that is neither text nor a whole number but {kind} ({shown(value, 60)})")


def _weights(items: Iterable[tuple[Any, Any]], where: str) -> Target | None:
    found: dict[str, float] = {}
    for answer, weight in items:
        name = _name(answer, where)
        if not name or weight is None:  # tables give every row of a column the same fields
            continue
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
            given = f"the answer {shown(name, 60)} the weight {shown(weight, 40)}"
            raise ValueError(f"{where} gives {given}; weights are numbers in 0..1")
        found[name] = float(weight)
    return found or None
