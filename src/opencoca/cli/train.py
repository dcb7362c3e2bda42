"""`opencoca train`: trains a model as a recipe says."""

import sys
from pathlib import Path
from typing import Any

from opencoca.cli.common import CommandError, choose_threads

_PURPOSE = "Train a model as a recipe says, or continue where an earlier run of it stopped."
_EXAMPLE = "opencoca train flickr8k --data.train-images DIR --data.train-captions TABLE --epochs 5"
_HELP, _PHASE = {"-h", "--help"}, "--continue-with"


def add_commands(commands: Any) -> None:
    """Adds the command to the list; `run_train` gets its arguments unparsed, for the recipe's own parser."""
    commands.add_parser("train", help=_PURPOSE, add_help=False)


def run_train(argv: list[str]) -> int:
    has_recipe = bool(argv) and not argv[0].startswith("-")
    if _HELP & set(argv):
        print(_help(argv[0], [text for text in argv[1:] if text not in _HELP]) if has_recipe else _help())
        return 0
    if not has_recipe:
        raise CommandError("the recipe comes first: opencoca train RECIPE [--key value ...]")

    from opencoca.distributed.world import is_main_process
    from opencoca.train import load_recipe, train

    options, changed = _split_phase(argv[1:])
    recipe = load_recipe(argv[0], options)
    from opencoca.train.step import NonFiniteLossError
    from opencoca.train.trainer import TrainingInterrupted

    _choose_threads(recipe.device, Path(recipe.output))
    try:
        folder = train(recipe, changed)
    except (TrainingInterrupted, NonFiniteLossError) as error:
        exit_code = 130 if isinstance(error, TrainingInterrupted) else 2
        if not is_main_process():  # all processes stop together, and one says why
            raise SystemExit(exit_code) from error
        raise CommandError(str(error), exit_code=exit_code) from error
    if is_main_process():
        print(f"the trained model is in {folder}")
    return 0


def _split_phase(argv: list[str]) -> tuple[list[str], list[str]]:
    """The options without --continue-with KEY[=VALUE] ..., its values as options of their own; and its keys."""
    from opencoca.train.recipe.load import recipe_key

    options, keys, in_phase = [], [], False
    for text in argv:
        option, equals, value = text.partition("=")
        if text.startswith("--"):
            in_phase = option.replace("_", "-") == _PHASE
            if not in_phase:
                options.append(text)
                continue
            if not equals:
                continue
            text = value
        if not in_phase:
            options.append(text)
            continue
        key, equals, value = text.partition("=")
        keys.append(recipe_key(key))
        if equals:
            options.append(f"--{key}={value}")
    if any(option.replace("_", "-").split("=")[0] == _PHASE for option in argv) and not keys:
        raise CommandError(f"{_PHASE} needs KEY=VALUE, such as epochs=20, or data")
    return options, keys


def _choose_threads(device: str, folder: Path) -> None:
    """On a CPU: as many threads as the run in the folder began with, so that it stays the same; else those free now."""
    from opencoca.distributed.world import is_main_process
    from opencoca.train.run_folder import RunFolder

    line = choose_threads(device, RunFolder(folder).threads())
    if line and is_main_process():
        print(line, file=sys.stderr)


def _help(recipe: str | None = None, options: list[str] | None = None) -> str:
    from opencoca.train.recipe.help import describe_values

    values = describe_values(recipe, _split_phase(options or [])[0])
    what = "the keys of a recipe and their defaults" if recipe is None else f"the values of {recipe}"
    return (
        f"usage: opencoca train RECIPE [--key value ...] [{_PHASE} KEY=VALUE ...]\n\n{_PURPOSE}\n\n"
        f"example:\n  {_EXAMPLE}\n\n"
        "RECIPE is a YAML file of the keys below, those with a dot nested, or the name of a recipe that comes with\n"
        "the package; --KEY VALUE overrides a key, with hyphens or underscores. `opencoca train RECIPE --help` shows\n"
        "the values of that recipe. Ctrl-C saves the state, and the same command continues from it;\n"
        f"{_PHASE} KEY=VALUE continues with another value, and {_PHASE} data with other data.\n\n{what}:\n{values}"
    )
