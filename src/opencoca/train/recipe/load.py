"""From a recipe file, or its values, and overrides to a `Recipe`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from opencoca.inference.loading import ModelDescription, describe_model
from opencoca.model.config import NAMED_SIZES, CoCaConfig, at_todays_places
from opencoca.tasks import TASKS
from opencoca.train.recipe.recipe import Recipe

# Sections that may be given as a single word, and the key that the word is of.
_SHORT = {"task": "name", "init_from": "model"}
# Keys of earlier versions, and what they are called now.
_RENAMED = {"loss": "task", "select_by": "task.select_by", "val_max_new_tokens": "task.max_new_tokens"}
_SECTIONS = frozenset(name for name, value in vars(Recipe()).items() if is_dataclass(value))


def recipe_parser(
    task: str = "pretraining", size: str = "small", start: ModelDescription | None = None
) -> ArgumentParser:
    """The parser of recipes of a task; size, or the model that training starts from, gives the model's defaults."""
    parser = ArgumentParser(prog="opencoca train", exit_on_error=False)
    parser.add_class_arguments(Recipe, skip={"task"})
    parser.add_class_arguments(TASKS[task][0], "task")
    # The head of the task that a start model was finetuned on is left; this run's task adds its own.
    config = CoCaConfig.named(size) if start is None else replace(start.config, head=None)
    parser.set_defaults({"size": size, "model": config.to_dict()})
    if start is not None:
        looks = start.preprocess
        parser.set_defaults({"tokenizer.source": "init_from", "data.resize_mode": looks.resize_mode})
        parser.set_defaults({"data.mean": looks.mean, "data.std": looks.std})
    return parser


def load_recipe(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides such as ``["--batch_size", "32"]``.

    Args:
        recipe: a YAML file, or what would be in one: ``{"init_from": "coca-flickr8k", "epochs": 5, ...}``.
        overrides: options as on the command line.

    Raises:
        ValueError: a file that is missing or not YAML, unknown keys, impossible values; it names file and key.
        FileNotFoundError: there is no such model as init_from names.
    """
    where = "recipe" if isinstance(recipe, Mapping) else f"recipe {recipe}"
    values = dict(recipe) if isinstance(recipe, Mapping) else _read(Path(recipe))
    values, overrides = _renamed(values, where), _renamed_options(overrides)
    for name, section in values.items():
        if name in _SECTIONS and not isinstance(section, dict):
            raise ValueError(f"{where}: {name} must be a mapping of keys to values, got {section!r}")
    task = _option(overrides, "task.name") or values.get("task", {}).get("name", "pretraining")
    if task not in TASKS:
        raise ValueError(f"{where}: there is no task {task!r}; known tasks: {', '.join(TASKS)}")
    size = _option(overrides, "size") or values.get("size", "small")
    if size not in NAMED_SIZES:
        raise ValueError(f"{where}: there is no size {size!r}; known sizes: {', '.join(NAMED_SIZES)}")
    if _option(overrides, "init_from.model") and "init_from" in values:
        values["init_from"] = {}  # weights and checkpoint there are of another model
    parser = recipe_parser(task, size, _start(values, overrides))
    try:
        if "model" in values:
            values["model"] = at_todays_places(values["model"])
        from_file = parser.parse_object(values, defaults=True)
        namespace: Namespace = parser.parse_args(overrides, namespace=from_file) if overrides else from_file
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
        return Recipe(**vars(instantiate(namespace)))
    except Exception as error:
        raise ValueError(f"{where}: {_in_plain_words(error)}") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must be a mapping of keys to values")
    return values


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe, short or of an earlier version, as this version writes them.

    Raises ValueError if a key is given under its old and its new name.
    """
    found = dict(values)
    for name, key in _SHORT.items():
        if isinstance(found.get(name), str):
            found[name] = {key: found[name]}
    for old, new in _RENAMED.items():
        if old not in found:
            continue
        section, _, key = new.partition(".")
        moved = found.pop(old)
        moved, target = {key: moved} if key else moved, found.get(section) or {}
        if not isinstance(moved, dict) or not isinstance(target, dict) or moved.keys() & target.keys():
            raise ValueError(f"{old} is called {new} now, which must be a mapping; give one of the two")
        found[section] = {**target, **moved}
    return found


def _renamed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return upgraded(values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _renamed_options(overrides: Sequence[str]) -> list[str]:
    """The options under the names that keys have now, those of `_SHORT` sections written out."""
    names = {f"--{old}": f"--{new}" for old, new in _RENAMED.items()}
    names |= {f"--{section}": f"--{section}.{key}" for section, key in _SHORT.items()}
    renamed = []
    for argument in overrides:
        option, equals, value = argument.partition("=")
        head, dot, rest = option.partition(".")
        if option in names:
            argument = names[option] + equals + value
        elif head == "--loss" and dot:
            argument = f"--task.{rest}{equals}{value}"
        renamed.append(argument)
    return renamed


def _start(values: Mapping[str, Any], overrides: Sequence[str]) -> ModelDescription | None:
    """The model that training starts from, if its architecture is wanted: a stored recipe has all of it already."""
    given = {**(values.get("init_from") or {})}
    given |= {
        key: found for key in ("model", "weights", "checkpoint") if (found := _option(overrides, f"init_from.{key}"))
    }
    if not given.get("model") or {field.name for field in fields(CoCaConfig)} <= set(values.get("model", {})):
        return None
    return describe_model(given["model"], weights=given.get("weights"), checkpoint=given.get("checkpoint"))


def _in_plain_words(error: Exception) -> str:
    """jsonargparse's message in one line, with the names of Python's types as people write them."""
    text = re.sub(r"a <class '(\w+)'>", r"\1", " ".join(str(error).split()))
    return text.removeprefix("Parser key ").replace("a typing.Literal", "one of ")


def _option(overrides: Sequence[str], name: str) -> str | None:
    """The value of an option among overrides."""
    for index, argument in enumerate(overrides):
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
        if argument == f"--{name}" and index + 1 < len(overrides):
            return overrides[index + 1]
    return None
