"""From a recipe file, or its values, and overrides to a `Recipe`."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from opencoca.inference.loading import ModelDescription, describe_model
from opencoca.model.config import NAMED_SIZES, CoCaConfig, at_todays_places
from opencoca.system.messages import brief, shown
from opencoca.system.names import did_you_mean
from opencoca.tasks import TASKS
from opencoca.train.recipe.recipe import Recipe
from opencoca.train.recipe.yaml_file import read_recipe_file

# Sections that may be given as a single word, and the key that the word is of.
_SHORT = {"task": "name", "init_from": "model"}
# Keys of earlier versions, and what they are called now.
_RENAMED = {"loss": "task", "select_by": "task.select_by", "val_max_new_tokens": "task.max_new_tokens"}
_SECTIONS = frozenset(name for name, value in vars(Recipe()).items() if is_dataclass(value))
# Options of earlier versions and those of `_SHORT` sections, as they are written out.
_OPTIONS_OF_TODAY = {f"--{old}": f"--{new}" for old, new in _RENAMED.items()}
_OPTIONS_OF_TODAY |= {f"--{section}": f"--{section}.{key}" for section, key in _SHORT.items()}
_DEEPEST = 40
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_TYPES |= {"list": "a list", "tuple": "a list", "dict": "a mapping"}
_LONGEST_MESSAGE = 290


def recipe_parser(
    task: str = "pretraining", size: str = "small", start: ModelDescription | None = None
) -> ArgumentParser:
    """The parser of recipes of a task; size, or the model that training starts from, gives the model's defaults."""
    return _make_parser(task, size, start) if start else _parser_of_size(task, size)


@functools.cache
def _parser_of_size(task: str, size: str) -> ArgumentParser:
    """The parser for a size. Making one takes a third of the time of reading a recipe."""
    return _make_parser(task, size, None)


def _make_parser(task: str, size: str, start: ModelDescription | None) -> ArgumentParser:
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
        recipe: a YAML file, the name of a recipe that comes with the package (``flickr8k``), or what would be in a
            file: ``{"init_from": "coca-flickr8k", "epochs": 5, ...}``.
        overrides: options as on the command line. Keys may have hyphens for underscores everywhere.

    Raises:
        ValueError: a file that is missing or not YAML, unknown keys, impossible values; it names file and key.
        FileNotFoundError: there is no such model as init_from names.
    """
    where = "recipe" if isinstance(recipe, Mapping) else f"recipe {brief(str(recipe), 150)}"
    values = recipe if isinstance(recipe, Mapping) else read_recipe_file(recipe)
    with _named(where):
        asked = _asked_for(values, overrides)
    parser = recipe_parser(asked.task, asked.size, _start(asked.values, asked.options))
    with _named(where):
        _check_keys(asked, parser)
        _check_nulls(asked.values, Recipe, {"task": TASKS[asked.task][0]})
        from_file = parser.parse_object(asked.values, defaults=True)
        namespace: Namespace = parser.parse_args(asked.options, namespace=from_file) if asked.options else from_file
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
        return Recipe(**vars(instantiate(namespace)))


def recipe_key(name: str) -> str:
    """The key that a name means today: with underscores, not by its name of before, never a short section's."""
    return _option_of_today(f"--{name}").removeprefix("--")


class _Asked(NamedTuple):
    """What the user asks for: values and options, under the keys of today; task and size, which give defaults."""

    values: dict[str, Any]
    options: list[str]
    task: str
    size: str


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Every error in here becomes a ValueError of one sentence that names the recipe."""
    try:
        yield
    except Exception as error:
        message = brief(_in_plain_words(error), _LONGEST_MESSAGE - len(where)) or type(error).__name__
        raise ValueError(f"{where}: {message}") from error


def _asked_for(given: Mapping[str, Any], overrides: Sequence[str]) -> _Asked:
    """Raises ValueError for sections that are none, and for unknown tasks and sizes."""
    values, options = upgraded(_with_underscores(given)), [_option_of_today(text) for text in overrides]
    for name, section in values.items():
        if name in _SECTIONS and not isinstance(section, dict):
            raise ValueError(f"{name} must be a mapping of keys to values, got {shown(section)}")
    for name, value in values.get("init_from", {}).items():
        if not isinstance(value, str | None):
            raise ValueError(f"init_from.{name} must be text, got {shown(value)}")
    task = _option(options, "task.name") or values.get("task", {}).get("name", "pretraining")
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"there is no task {shown(task)}; known tasks: {', '.join(TASKS)}")
    size = _option(options, "size") or values.get("size", "small")
    if not isinstance(size, str) or size not in NAMED_SIZES:
        raise ValueError(f"there is no size {shown(size)}; known sizes: {', '.join(NAMED_SIZES)}")
    if _option(options, "init_from.model") and "init_from" in values:
        values["init_from"] = {}  # weights and checkpoint there are of another model
    if "model" in values:
        values["model"] = at_todays_places(values["model"])
    return _Asked(values, options, task, size)


def _with_underscores(value: Any, depth: int = 0) -> Any:
    """Values whose keys may have hyphens. Raises ValueError for keys that are no words, or given in both forms."""
    if depth > _DEEPEST:
        raise ValueError(f"its values are nested more than {_DEEPEST} levels deep, and a recipe's are not")
    if isinstance(value, list | tuple):
        return [_with_underscores(item, depth + 1) for item in value]
    if not isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise ValueError(f"the key {shown(key)} is not a word")
        name = key.replace("-", "_")
        if name in found:
            raise ValueError(f"{name} is given twice, with hyphens and with underscores; keep one of them")
        found[name] = _with_underscores(item, depth + 1)
    return found


def _check_keys(asked: _Asked, parser: ArgumentParser) -> None:
    """Raises ValueError for a key that no recipe has, with the one that is most like it."""
    known = list(parser.get_defaults().keys(branches=True))
    for key in _keys_of(asked.values, frozenset(known)):
        if key not in known:
            raise ValueError(f"unknown key {brief(key, 100)}{did_you_mean(key, known)}")
    for option in asked.options:
        key = option.partition("=")[0].removeprefix("--")
        if option.startswith("--") and key not in known:
            raise ValueError(f"unknown option --{brief(key, 100)}{did_you_mean(key, known)}")


def _check_nulls(values: Mapping[str, Any], cls: type, sections: Mapping[str, type], where: str = "") -> None:
    """Raises ValueError for a null where a value is needed, which jsonargparse takes for any type.

    sections: classes of sections that are not those of the fields' hints.
    """
    for name, hint in get_type_hints(cls).items():
        value, section = values.get(name, ...), sections.get(name, hint)
        if value is None and NoneType not in get_args(hint):
            raise ValueError(f"{where}{name} must have a value, got null")
        if isinstance(value, Mapping) and isinstance(section, type) and is_dataclass(section):
            _check_nulls(value, section, {}, f"{where}{name}.")


def _keys_of(values: Mapping[str, Any], known: frozenset[str], section: str = "") -> Iterator[str]:
    """The dotted keys of values, as deep as recipes have keys; a value may itself be a mapping."""
    for name, value in values.items():
        key = f"{section}{name}"
        yield key
        if isinstance(value, Mapping) and any(other.startswith(f"{key}.") for other in known):
            yield from _keys_of(value, known, f"{key}.")


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


def _option_of_today(argument: str) -> str:
    """An option under the name that its key has now; a value is left as it is."""
    option, equals, value = argument.partition("=")
    if not option.startswith("--"):
        return argument
    option = "--" + option[2:].replace("-", "_")
    head, dot, rest = option.partition(".")
    if head == "--loss" and dot:
        option = f"--task.{rest}"
    return _OPTIONS_OF_TODAY.get(option, option) + equals + value


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
    """What jsonargparse says of a value of the wrong type, with the names of types as people write them."""
    text = str(error).removeprefix("Parser key ")
    key, value = text.partition(":")[0].strip('"'), re.search(r"(?:Got|Given) value: (.*)", text, re.DOTALL)
    if unknown := re.search(r"Option '(.*?)' is not accepted", text):
        return f"{key} has an unknown key {unknown[1]}"
    wanted = [_TYPES.get(found[1], found[1]) for found in re.finditer(r"Expected a <class '(\w+)'>", text)]
    wanted += [f"one of {choices.replace(chr(39), '')}" for choices in re.findall(r"typing\.Literal\[(.*?)\]\.", text)]
    if not (wanted and value):
        return text
    return f"{key} must be {' or '.join(wanted)}, got {brief(value[1], 80) or 'nothing'}"


def _option(overrides: Sequence[str], name: str) -> str | None:
    """The value of an option among overrides."""
    for index, argument in enumerate(overrides):
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
        if argument == f"--{name}" and index + 1 < len(overrides):
            return overrides[index + 1]
    return None
