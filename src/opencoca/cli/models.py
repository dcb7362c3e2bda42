"""`opencoca models`: which models come with the package."""

import argparse
from typing import Any

from opencoca.cli.common import add_command


def add_commands(commands: Any) -> None:
    add_command(
        commands,
        "models",
        run_models,
        "List the models that --model knows by name.",
        example="opencoca models",
        more="A model's folder, such as that of a training run, can be given instead of a name.",
    )


def run_models(arguments: argparse.Namespace) -> int:
    from opencoca.model_folder import WEIGHTS_FILE
    from opencoca.pipeline import DEFAULT_MODEL, available_models

    for model in available_models():
        weights = model.folder / WEIGHTS_FILE
        size = f"{weights.stat().st_size / 1e6:.0f} MB" if weights.is_file() else "not in this installation"
        default = ", the default" if model.name == DEFAULT_MODEL else ""
        print(f"{model.name} ({size}{default})\n  {model.description}\n  licence: {model.licence}")
    return 0
