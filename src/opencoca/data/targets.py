"""Targets: the class of a sample, or answers with weights, out of tables, shards and folders."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

Target = str | Mapping[str, float]
"""The name of a class; or answers, each with its weight from 0 to 1."""


def parse_target(value: Any, where: str, *, parse_json: bool = False) -> Target | None:
    """The target that a table cell or JSON field holds; None for a blank or missing one.

    Text is a class, and so is a whole number. A list names several answers: the weight of each is its share of the
    list, and a list of one name, however often, is that class. A mapping gives weights itself.

    Args:
        value: what the cell or field holds.
        where: where that is, for messages.
        parse_json: whether text that is a JSON list or object counts as one, as in a CSV.

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
    """Parses the text of a cell if it is a JSON list or object; else returns the value as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


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
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    kind = type(value).__name__
    raise ValueError(f"{where} has a label that is neither text nor a whole number but {kind} ({value!r})")


def _weights(items: Iterable[tuple[Any, Any]], where: str) -> Target | None:
    found: dict[str, float] = {}
    for answer, weight in items:
        name = _name(answer, where)
        if not name or weight is None:  # tables give every row of a column the same fields
            continue
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
            raise ValueError(f"{where} gives the answer {name!r} the weight {weight!r}; weights are numbers in 0..1")
        found[name] = float(weight)
    return found or None
