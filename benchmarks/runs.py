"""Training runs that a benchmark compares: each trained once, however often the benchmark is started; what they scored.

A run that its metrics file says is complete is read; one that was interrupted is continued.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opencoca.system.devices import choose_device
from opencoca.train import Recipe, load_recipe
from opencoca.train.report.metrics_log import read_metrics
from opencoca.train.run_folder import remember_recipe
from opencoca.train.trainer import Trainer, TrainingInterrupted

_NO_SCORES = ("kind", "step", "epoch", "num_images", "num_texts")
_LAST_TRAIN_LINES = 5


@dataclass(frozen=True)
class RunResult:
    """What a complete run scored after its last step.

    scores: of the validation set; train_loss: mean over the last logged steps; step_ms: median over the whole run.
    """

    steps: int
    scores: dict[str, float]
    train_loss: float
    step_ms: float

    def values(self) -> dict[str, float]:
        return {**self.scores, "train_loss": self.train_loss, "step_ms": self.step_ms}


def add_run_arguments(parser: argparse.ArgumentParser, runs: str) -> None:
    """The arguments that all benchmarks of runs have; runs: where their folders are by default."""
    parser.add_argument("--images", required=True, help="folder of photographs")
    parser.add_argument("--train", required=True, help="captions to train on")
    parser.add_argument("--val", required=True, help="captions to validate on")
    parser.add_argument("--recipe", default="recipes/objectives.yaml")
    parser.add_argument("--runs", default=runs, help="folder of the runs")
    parser.add_argument("--features", help="folder of the stored features that all runs share; by default in --runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of every run; by default the recipe's")
    parser.add_argument("--max-steps", type=int, help="ends every run so early: a trial, no result")
    parser.add_argument("--out")


def recipe_of_run(arguments: argparse.Namespace, name: str, seed: int, settings: dict[str, Any]) -> Recipe:
    """The recipe of run ``name``: the base recipe with these settings (dotted keys), validated at its end alone."""
    epochs = arguments.epochs or load_recipe(arguments.recipe).epochs
    options = {
        "data.train_images": arguments.images,
        "data.train_captions": arguments.train,
        "data.val_images": arguments.images,
        "data.val_captions": arguments.val,
        "output": Path(arguments.runs) / f"{name}_{seed}",
        "encoder.cache_dir": arguments.features or Path(arguments.runs) / "features",
        "seed": seed,
        "epochs": epochs,
        "validate_every_epochs": epochs,
    }
    if arguments.max_steps:
        options["max_steps"] = arguments.max_steps
    options |= settings
    return load_recipe(arguments.recipe, [word for key in options for word in (f"--{key}", _as_text(options[key]))])


def _as_text(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool | list) else str(value)


def train_once(make_trainer: Callable[[Recipe], Trainer], recipe: Recipe) -> RunResult:
    """Trains the recipe, or continues it, unless its folder holds the complete run already.

    Raises ValueError if the folder holds a run of another recipe, and SystemExit after Ctrl-C or SIGTERM.
    """
    folder = Path(recipe.output)
    if (result := _result(folder, recipe)) is not None:
        remember_recipe(folder, recipe, choose_device(recipe.device), continues=True)
        return result
    torch.compiler.reset()  # what was compiled for the run before
    try:
        make_trainer(recipe).run()
    except TrainingInterrupted as interrupted:
        raise SystemExit(f"{folder}: {interrupted}") from interrupted
    result = _result(folder, recipe)
    assert result is not None, f"{folder} ended without a validation"
    return result


def _result(folder: Path, recipe: Recipe) -> RunResult | None:
    """None if the run is not complete."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    last = next((line for line in reversed(lines) if line["kind"] == "validation"), None)
    if last is None or (last["epoch"] < recipe.epochs and last["step"] != recipe.max_steps):
        return None
    scores = {name: value for name, value in last.items() if name not in _NO_SCORES}
    logged = [line for line in lines if line["kind"] == "train"]
    train_loss = statistics.mean(line["loss"] for line in logged[-_LAST_TRAIN_LINES:])
    return RunResult(last["step"], scores, train_loss, statistics.median(line["step_ms"] for line in logged))


def summary(runs: Sequence[RunResult]) -> dict[str, dict[str, Any]]:
    """By the name of a score: its mean, lowest and highest, and all its values in the order of the runs."""
    table = {}
    for name in runs[0].values():
        values = [run.values()[name] for run in runs]
        table[name] = {"mean": statistics.mean(values), "min": min(values), "max": max(values), "values": values}
    return table


def differences(ours: Sequence[RunResult], theirs: Sequence[RunResult]) -> dict[str, dict[str, float] | None]:
    """`welch` of every score of two kinds of runs; None where one kind has a single run. Times are left out."""
    return {
        name: welch([run.values()[name] for run in ours], [run.values()[name] for run in theirs])
        for name in ours[0].values()
        if name != "step_ms"
    }


def welch(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float] | None:
    """The difference of two means, ours minus theirs, by Welch's test, which lets the variances differ.

    p_value: how often runs that differ in nothing but their seeds would differ at least so much (two-sided).
    """
    if min(len(ours), len(theirs)) < 2:
        return None
    difference = statistics.mean(ours) - statistics.mean(theirs)
    shares = [statistics.variance(values) / len(values) for values in (ours, theirs)]
    error = math.sqrt(sum(shares))
    if error == 0:
        return {"difference": difference, "standard_error": 0.0, "p_value": float(difference == 0)}
    freedom = sum(shares) ** 2 / sum(
        share**2 / (len(values) - 1) for share, values in zip(shares, (ours, theirs), strict=True)
    )
    p_value = _student_tails(difference / error, freedom)
    return {
        "difference": difference,
        "standard_error": error,
        "degrees_of_freedom": freedom,
        "p_value": p_value,
    }


def _student_tails(t: float, freedom: float) -> float:
    """P(|T| >= |t|) of Student's t: with T = sqrt(freedom) tan(angle), an angle's density goes as cos^(freedom - 1)."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles).clip(0) ** (freedom - 1)
    pieces = (density[1:] + density[:-1]) / 2
    beyond = angles[1:] > math.atan(abs(t) / math.sqrt(freedom))
    return float(pieces[beyond].sum() / pieces.sum())


def print_table(summaries: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Every score as a line: mean (lowest to highest) of each kind of runs."""
    names = list(next(iter(summaries.values())))
    print(f"{'':28}" + "".join(f"{kind:>36}" for kind in summaries))
    for name in names:
        cells = (summaries[kind][name] for kind in summaries)
        texts = (f"{cell['mean']:.5g} ({cell['min']:.5g} to {cell['max']:.5g})" for cell in cells)
        print(f"{name:28}" + "".join(f"{text:>36}" for text in texts))


def print_differences(found: dict[str, dict[str, float] | None], what: str) -> None:
    """Every score's difference as a line; what: the two kinds of runs, in words."""
    print(f"\n{what}: difference of the means, its standard error, p-value (Welch)")
    for name, test in found.items():
        if test is not None:
            print(f"{name:28}{test['difference']:>+12.4g}{test['standard_error']:>12.4g}{test['p_value']:>9.3f}")
