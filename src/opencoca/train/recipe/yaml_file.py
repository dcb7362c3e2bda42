"""Finds and reads recipe files; what a file may hold is bounded before anything is made of it."""

import os
from pathlib import Path
from typing import Any

import yaml

from opencoca.system.messages import brief
from opencoca.system.names import did_you_mean

_MOST_BYTES = 200_000
_MOST_VALUES = 5_000
_DEEPEST = 24
_PACKAGED = Path(__file__).parents[2] / "assets" / "recipes"


class _NotARecipe(ValueError):
    """The file is YAML, but not what a recipe may be."""


def recipe_names() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(_PACKAGED.glob("*.yaml"))}


def read_recipe_file(name: str | Path) -> dict[str, Any]:
    """Reads a recipe: a YAML file, or one that comes with the package, by its name.

    Raises ValueError in one sentence: no such recipe, not YAML, keys that are given twice, or more than a recipe has.
    """
    path = Path(name)
    if not os.path.isfile(path):  # no error for names that no file can have
        known = recipe_names()
        if str(name) not in known:
            raise ValueError(_no_such_recipe(str(name), list(known)))
        path = known[str(name)]
    with open(path, "rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"recipe {brief(name, 150)} is no recipe: it has more than {_MOST_BYTES:,} bytes")
    try:
        values = yaml.load(text, _BoundedLoader)  # a safe loader
    except _NotARecipe as error:
        raise ValueError(f"recipe {brief(name, 120)}: {error}") from error
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:
        reason = brief(str(error).replace('in "<byte string>", ', "in "), 150)
        raise ValueError(f"recipe {brief(name, 120)} is not YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"recipe {brief(name, 150)} must be a mapping of keys to values")
    return values


def _no_such_recipe(name: str, known: list[str]) -> str:
    if "/" in name or name.endswith((".yaml", ".yml", ".json")) or not known:
        return f"there is no recipe {brief(name, 200)}"
    hint = did_you_mean(name, known) or f"; give a file, or one of {', '.join(known)}"
    return f"there is no recipe {brief(name, 80)}{hint}"


class _BoundedLoader(yaml.SafeLoader):
    """Reads YAML of plain types; counts every value as often as aliases repeat it, and stops at what no recipe has."""

    def __init__(self, stream: bytes):
        super().__init__(stream)
        self._depth, self._values = 0, 0
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise _NotARecipe(f"the anchor &{brief(event.anchor, 40)} contains itself; write its values out")
            self._count(self._sizes.get(event.anchor, 0))
            return super().compose_node(parent, index)
        before = self._values
        self._count(1)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _NotARecipe(f"its values are nested more than {_DEEPEST} levels deep, and a recipe's are not")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor:
            self._sizes[event.anchor] = self._values - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _NotARecipe("a key is a list or a mapping; keys are words")
            if key.value in seen:
                line = key.start_mark.line + 1
                raise _NotARecipe(f"{brief(key.value, 80)} is given twice, again in line {line}; keep one of them")
            seen.add(key.value)
        return node

    def _count(self, values: int) -> None:
        self._values += values
        if self._values > _MOST_VALUES:
            raise _NotARecipe(f"it has more than {_MOST_VALUES:,} values, aliases counted as often as they stand")
