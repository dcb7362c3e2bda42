"""`opencoca train`: trains a model as a recipe says."""

from typing import Any

from opencoca.cli.common import CommandError

_PURPOSE = "Train a model as a recipe file says, or continue where an earlier run of it stopped."
_EXAMPLE = "opencoca train recipes/flickr8k.yaml --data.train_images DIR --epochs 5"


def add_commands(commands: Any) -> None:
    """Adds the command to the list; `run_train` gets its arguments unparsed, for the recipe's own parser."""
    commands.add_parser("train", help=_PURPOSE, add_help=False)


def run_train(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(_help())
        return 0
    if not argv or argv[0].startswith("-"):
        raise CommandError("the recipe comes first: opencoca train RECIPE [--key value ...]")

    from opencoca.distributed.world import is_main_process
    from opencoca.train import load_recipe, train

    recipe = load_recipe(argv[0], argv[1:])
    from opencoca.train.step import NonFiniteLossError
    from opencoca.train.trainer import TrainingInterrupted

    try:
        folder = train(recipe)
    except (TrainingInterrupted, NonFiniteLossError) as error:
        exit_code = 130 if isinstance(error, TrainingInterrupted) else 2
        if not is_main_process():  # all processes stop together, and one says why
            raise SystemExit(exit_code) from error
        raise CommandError(str(error), exit_code=exit_code) from error
    if is_main_process():
        print(f"the trained model is in {folder}")
    return 0


def _help() -> str:
    from opencoca.train.recipe.load import recipe_parser

    options = recipe_parser().format_help().partition("\noptions:\n")[2]
    return (
        f"usage: opencoca train RECIPE [--key value ...]\n\n{_PURPOSE}\n\nexample:\n  {_EXAMPLE}\n\n"
        "RECIPE is a YAML file of the keys below, those with a dot nested; an option of the same name overrides it.\n"
        "Ctrl-C saves the state, and the same command continues from it.\n\noptions:\n" + options.rstrip()
    )
