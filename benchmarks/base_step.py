"""One full training step of a paper-size CoCa: seconds and peak memory.

    python benchmarks/base_step.py [--size base] [--batch-size 8] [--out FILE]

Random 288 x 288 images, captions of 20 random words in the paper's vocabulary of 64,000; bf16 autocast, AdamW.
"""

import argparse
import time

import torch
from common import peak_bytes, report

from opencoca.data import Batch
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.system.allocator import keep_freed_memory
from opencoca.train.optim.optimizer import build_optimizer
from opencoca.train.recipe.recipe import OptimizerRecipe, Recipe
from opencoca.train.step import TrainStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--words", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out")
    arguments = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(0)
    config = CoCaConfig.named(arguments.size)
    model = CoCa(config)
    optimizer = OptimizerRecipe(warmup_steps=1)
    recipe = Recipe(size=arguments.size, model=config, batch_size=arguments.batch_size, optimizer=optimizer)
    step = TrainStep(model, build_optimizer(model, recipe), None, recipe)
    images = torch.randn(arguments.batch_size, 3, *config.image.image_size)
    token_ids = torch.randint(3, config.text.vocab_size, (arguments.batch_size, arguments.words))
    batch = Batch(torch.arange(arguments.batch_size), images, token_ids, torch.ones_like(token_ids).bool())
    seconds, losses = [], []
    for number in range(arguments.steps):
        start = time.perf_counter()
        losses.append(step(batch, number, 10).loss)
        seconds.append(time.perf_counter() - start)
    report(
        {
            "size": arguments.size,
            "million_parameters": sum(p.numel() for p in model.parameters()) / 1e6,
            "batch_size": arguments.batch_size,
            "words": arguments.words,
            "losses": losses,
            "step_seconds": seconds,
            "peak_gb": peak_bytes() / 1e9,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
