"""Does Muon win? AdamW, Adafactor and Muon on the same recipe, each at its own best learning rate.

    python benchmarks/optimizers.py --images DIR --train train.csv --val val.csv [--seeds 0 1 2] [--epochs N]
        [--learning-rates 0.75e-3 1.5e-3 3e-3] [--optimizers adamw adafactor muon] [--runs DIR] [--features DIR]
        [--out FILE]

Trains the recipe with every optimizer at every learning rate on the first seed, and with the best of each (by the
recipe's selection: CIDEr-D x 100 + both R@1, in percent) on the other seeds. Prints validation scores and losses of all
runs, mean, lowest and highest of the best over the seeds, and how the others differ from AdamW (Welch). adafactor has
the betas of the paper; all else is the recipe's: schedule, weight decay, clipping, average.
Started again, it continues: complete runs are read and not trained again.
"""

import argparse
from typing import Any

from common import report
from runs import (
    RunResult,
    add_run_arguments,
    differences,
    print_differences,
    print_table,
    recipe_of_run,
    summary,
    train_once,
)

from opencoca.tasks.pretraining import Pretraining, PretrainingOptions
from opencoca.train.trainer import Trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adafactor": {"optimizer.name": "adafactor", "optimizer.betas": [0.9, 0.999]},
    "muon": {"optimizer.name": "muon"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, "runs/optimizers")
    parser.add_argument("--optimizers", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.75e-3, 1.5e-3, 3e-3])
    arguments = parser.parse_args()

    tried: dict[str, dict[float, RunResult]] = {}
    for name in arguments.optimizers:
        tried[name] = {rate: run(arguments, name, rate, arguments.seeds[0]) for rate in arguments.learning_rates}
    best = {name: max(runs, key=lambda rate: selection(runs[rate])) for name, runs in tried.items()}
    results = {
        name: [tried[name][rate], *(run(arguments, name, rate, seed) for seed in arguments.seeds[1:])]
        for name, rate in best.items()
    }
    for name, runs in tried.items():
        print_table({f"{name} {rate:g}": summary([result]) for rate, result in runs.items()})
        print()
    summaries = {name: summary(runs) for name, runs in results.items()}
    print_table({f"{name} {best[name]:g}": found for name, found in summaries.items()})
    others = [name for name in results if name != "adamw"] if "adamw" in results else []
    found = {name: differences(results[name], results["adamw"]) for name in others}
    for name in others:
        print_differences(found[name], f"{name} - adamw")
    result = {
        "recipe": arguments.recipe,
        "seeds": arguments.seeds,
        "steps": results[arguments.optimizers[0]][0].steps,
        "is_trial": arguments.max_steps is not None,
        "first_seed": {
            name: {f"{rate:g}": {"selection": selection(result)} | result.values() for rate, result in runs.items()}
            for name, runs in tried.items()
        },
        "best_learning_rate": best,
        "scores": summaries,
        "minus_adamw": found,
    }
    report(result, arguments.out)


def run(arguments: argparse.Namespace, name: str, learning_rate: float, seed: int) -> RunResult:
    settings = SETTINGS[name] | {"optimizer.learning_rate": learning_rate}
    recipe = recipe_of_run(arguments, f"{name}_{learning_rate:g}", seed, settings)
    return train_once(Trainer, recipe)


def selection(result: RunResult) -> float:
    return Pretraining(PretrainingOptions()).selection(result.scores)


if __name__ == "__main__":
    main()
