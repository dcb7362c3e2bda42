"""Is accuracy traded for speed or memory? The plain recipe against the same with everything fast and frugal on.

    python benchmarks/accuracy.py --images DIR --train train.csv --val val.csv [--seeds 0 1 2] [--epochs N]
        [--runs DIR] [--features DIR] [--out FILE]

plain: float32, the whole batch in one pass, its losses in one piece, nothing recomputed, nothing compiled, AdamW as a
loop over the parameters, no checkpoint before the end (but one every ten minutes, to continue an interrupted run).
fast: bfloat16 autocast (also of the stored features and in validation), GradCache in four parts, all blocks recomputed,
their MLPs compiled where there is a compiler, losses in chunks, fused AdamW, and a checkpoint every 25 steps, written
in the background. The same data in the same order, batch, schedule and starting weights; dropout differs.

What has no switch is in both: text computed at its words alone, three captions sharing their image, and the stored
features of the frozen encoder. Left out is what trains on something else by design: accumulation_steps (fewer
negatives), patch dropout (fewer patches). Every run asserts, in its first step, that its switches are on.

Prints, for every validation score, mean, lowest and highest of each kind over the seeds, and the difference of the
means with its standard error. Started again, it continues: complete runs are read and not trained again.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
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
from torch._dynamo.utils import counters

from opencoca.losses import captioning, contrastive
from opencoca.model.coca import CoCa, CoCaOutput
from opencoca.model.layers.blocks import TransformerBlock
from opencoca.train import Recipe
from opencoca.train.optim.optimizer import build_optimizer, parameter_groups
from opencoca.train.trainer import Trainer

PLAIN: dict[str, Any] = {
    "precision": "fp32",
    "accumulation_steps": 1,
    "grad_cache_steps": 1,
    "compute.recompute": "none",
    "compute.compile": False,
    "checkpoint.every_steps": None,
    "checkpoint.in_background": False,
}
FAST: dict[str, Any] = PLAIN | {
    "precision": "bf16",
    "grad_cache_steps": 4,
    "compute.recompute": "all",
    "compute.compile": torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++"))),
    "checkpoint.every_steps": 25,
    "checkpoint.in_background": True,
}
SIDES = {"plain": PLAIN, "fast": FAST}
# What the losses hold at a time, of (words, similarities). At this size the package would take each at once by itself.
CHUNKS = {"plain": (1 << 30, 1 << 30), "fast": (256, 16 * 288)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, "runs/accuracy")
    arguments = parser.parse_args()

    results: dict[str, list[RunResult]] = {side: [] for side in SIDES}
    for seed in arguments.seeds:
        for side, switches in SIDES.items():
            recipe = recipe_of_run(arguments, side, seed, switches)
            off = {key: value for key, value in switches.items() if attrgetter(key)(recipe) != value}
            assert not off, f"the recipe of {side} has other values for {off}"
            with loss_chunks(*CHUNKS[side]):
                results[side].append(train_once(trainer_of(side), recipe))
    summaries = {side: summary(runs) for side, runs in results.items()}
    found = differences(results["fast"], results["plain"])
    print_table(summaries)
    print_differences(found, "fast - plain")
    result = {
        "recipe": arguments.recipe,
        "seeds": arguments.seeds,
        "steps": results["plain"][0].steps,
        "is_trial": arguments.max_steps is not None,
        "switches": {
            side: switches | {"loss_chunks": CHUNKS[side], "fused_optimizer": side == "fast"}
            for side, switches in SIDES.items()
        },
        "scores": summaries,
        "fast_minus_plain": found,
    }
    report(result, arguments.out)


@contextmanager
def loss_chunks(words: int, similarities: int) -> Iterator[None]:
    """Limits what the two losses hold at a time: logits of so many words, and so many similarities."""
    before = captioning.LEAST_CHUNK_WORDS, captioning.CHUNK_LOGITS, contrastive.CHUNK_SIMILARITIES
    captioning.LEAST_CHUNK_WORDS, captioning.CHUNK_LOGITS, contrastive.CHUNK_SIMILARITIES = words, 1, similarities
    try:
        yield
    finally:
        captioning.LEAST_CHUNK_WORDS, captioning.CHUNK_LOGITS, contrastive.CHUNK_SIMILARITIES = before


def looping_adamw(model: CoCa, recipe: Recipe) -> torch.optim.AdamW:
    """The recipe's AdamW, parameter by parameter, operation by operation."""
    options = recipe.optimizer
    groups = parameter_groups(model, recipe)
    return torch.optim.AdamW(
        groups, options.learning_rate, betas=options.betas, eps=options.eps, foreach=False, fused=False
    )


def trainer_of(side: str):
    """A function from a recipe of this side to a trainer that will assert that it trains as this side says."""

    def make(recipe: Recipe) -> Trainer:
        trainer = Trainer(recipe, make_optimizer=build_optimizer if side == "fast" else looping_adamw)
        assert_as_built(trainer, side)
        assert_in_first_pass(trainer)
        return trainer

    return make


def assert_as_built(trainer: Trainer, side: str) -> None:
    """Of what does not change in training: blocks, optimizer, losses."""
    blocks = [module for module in trainer.model.modules() if isinstance(module, TransformerBlock)]
    assert blocks
    compute = trainer.recipe.compute
    assert all(block.recompute == (compute.recompute == "all") for block in blocks)
    assert all(("add_mlp" in vars(block)) == compute.compile for block in blocks), "compiled, or not, as asked for"
    assert bool(trainer.state.optimizer.defaults["fused"]) == (side == "fast")
    assert CHUNKS[side] == (captioning.LEAST_CHUNK_WORDS, contrastive.CHUNK_SIMILARITIES)


def assert_in_first_pass(trainer: Trainer) -> None:
    """Of what shows when the network runs: precision, how many images at once, and code that was compiled."""
    recipe = trainer.recipe

    def check(model: CoCa, given: tuple, output: CoCaOutput) -> None:
        hook.remove()
        assert model.training
        assert torch.is_autocast_enabled(trainer.device.type) == (recipe.precision == "bf16")
        assert len(given[0]) == recipe.batch_size // recipe.grad_cache_steps
        assert (counters["stats"]["unique_graphs"] > 0) == recipe.compute.compile, "compiled, or not, as asked for"

    counters.clear()
    hook = trainer.model.register_forward_hook(check)


if __name__ == "__main__":
    main()
