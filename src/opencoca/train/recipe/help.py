"""The keys of a recipe with their values, and a line that says what each is."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from opencoca.system.messages import brief
from opencoca.train.recipe.load import load_recipe, recipe_parser
from opencoca.train.recipe.recipe import Recipe

_WIDTH, _COLUMN, _LONGEST_VALUE = 118, 44, 40


def describe_values(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> str:
    """One line or more for each key: its value in this recipe, or its default, and what it is.

    Raises ValueError as `load_recipe` does.
    """
    loaded = Recipe() if recipe is None else load_recipe(recipe, overrides)
    lines, section = [], ""
    for action in recipe_parser(loaded.task.name)._actions:
        try:
            value = attrgetter(action.dest)(loaded)
        except AttributeError:  # an option of the parser itself, or a part that this recipe has none of
            continue
        if is_dataclass(value):
            continue
        if (new := action.dest.rpartition(".")[0]) != section:
            lines.append("")
            section = new
        left = f"{action.dest}: {_text(value)}"
        lines += _columns(left, " ".join((action.help or "").replace("None", "null").split()))
    return "\n".join(lines)


def _columns(left: str, right: str) -> list[str]:
    wrapped = textwrap.wrap(right, _WIDTH - _COLUMN - 2)
    first = [left] if len(left) > _COLUMN else [f"{left:<{_COLUMN}}  {wrapped.pop(0)}" if wrapped else left]
    return first + [" " * (_COLUMN + 2) + line for line in wrapped]


def _text(value: Any) -> str:
    return brief(value if isinstance(value, str) else json.dumps(value, default=str), _LONGEST_VALUE)
