"""What a training step costs over its floor: matrix FLOPs of the real words and images over the measured bf16 rate.

    python benchmarks/step_cost.py [--recipe recipes/flickr8k.yaml] [--frozen-stages -1] [--profile] [--out FILE]

Takes the recipe's model and options, and batches of random features and word ids with caption lengths as Flickr8k's.
The floor is for a wholly frozen encoder (--frozen-stages -1): the counter takes the backward pass of a depthwise
convolution for that of a full one.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from common import matmul_rate, median_seconds, report
from torch.utils.flop_counter import FlopCounterMode

from opencoca.data import Batch
from opencoca.model.coca import CoCa
from opencoca.system.allocator import keep_freed_memory
from opencoca.tasks import make_task
from opencoca.tasks.task import batch_losses
from opencoca.train import load_recipe
from opencoca.train.compute import autocast
from opencoca.train.optim.optimizer import WeightAverage, build_optimizer, freeze
from opencoca.train.step import TrainStep

# Token counts of Flickr8k's training captions in the recipe's vocabulary: mean 13.3, 99th percentile 26.
MEAN_LENGTH, SHORTEST, LONGEST = 13.3, 5, 32
# The rate that "the machine has" depends on the product: this model's are between these (6,000 x 384 x 384 to 5,000).
RATE_SIZES = (512, 1024, 4096)


def random_batch(model: CoCa, stages: int, images: int, captions: int, vocab_size: int) -> Batch:
    size = model.config.image.image_size
    with torch.no_grad():
        features = model.image_encoder.run_stages(torch.randn(2, 3, *size), 0, stages)
    inputs = torch.randn(images, *features.shape[1:]).half()
    lengths = torch.poisson(torch.full((images * captions,), MEAN_LENGTH)).clamp(SHORTEST, LONGEST)
    token_ids = torch.randint(3, vocab_size, (images * captions, int(lengths.max())))
    mask = torch.arange(token_ids.shape[1]) < lengths[:, None]
    return Batch(torch.arange(images), inputs, token_ids, mask, from_stage=stages)


class StepTime(NamedTuple):
    """Seconds of one step, and the FLOP a second of square products (size: rate) just before and after it."""

    seconds: float
    rates: dict[int, float]


def measure(step: Callable[[], object], repeats: int) -> list[StepTime]:
    """Steps and rates in turn: a shared machine is not equally fast from one second to the next."""

    def rates_now() -> dict[int, float]:
        return {size: matmul_rate(torch.bfloat16, size) for size in RATE_SIZES}

    for _ in range(3):
        step()
    times, before = [], rates_now()
    for _ in range(repeats):
        seconds = median_seconds(step, 1, warmup=0)
        after = rates_now()
        times.append(StepTime(seconds, {size: (before[size] + after[size]) / 2 for size in RATE_SIZES}))
        before = after
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/flickr8k.yaml")
    parser.add_argument("--frozen-stages", type=int, help="instead of the recipe's; -1 freezes the whole encoder")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=5000)
    parser.add_argument("--profile", action="store_true", help="also print the operations that take longest")
    parser.add_argument("--out")
    arguments = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(0)
    recipe = load_recipe(arguments.recipe, [])
    frozen = recipe.encoder.frozen_stages if arguments.frozen_stages is None else arguments.frozen_stages
    model = CoCa(replace(recipe.model, text=replace(recipe.model.text, vocab_size=arguments.vocab_size)))
    stages = freeze(model, replace(recipe, encoder=replace(recipe.encoder, frozen_stages=frozen)))
    average = WeightAverage(model, recipe.optimizer.ema_decay) if recipe.optimizer.ema_decay else None
    step = TrainStep(model, build_optimizer(model, recipe), average, recipe)
    batch = random_batch(model, stages, recipe.batch_size, recipe.data.captions_per_image, arguments.vocab_size)

    with FlopCounterMode(display=False) as counter, autocast(torch.device("cpu"), recipe.precision):
        losses = batch_losses(make_task(recipe.task), model, batch.to("cpu"))
        losses.total.backward()
    model.zero_grad()
    words = int(batch.token_mask.sum()) - len(batch.token_mask)
    flops = counter.get_total_flops()
    times = measure(lambda: step(batch, 0, 100), arguments.steps)
    rates = {size: statistics.median(time.rates[size] for time in times) for size in RATE_SIZES}
    report(
        {
            "recipe": arguments.recipe,
            "trained_million_parameters": sum(p.numel() for p in step.parallel.parameters) / 1e6,
            "million_parameters": sum(p.numel() for p in model.parameters()) / 1e6,
            "images": recipe.batch_size,
            "captions": len(batch.token_ids),
            "words": words,
            "step_tflop": flops / 1e12,
            "step_ms": 1e3 * statistics.median(time.seconds for time in times),
            "bf16_gflop_per_sec": {size: rate / 1e9 for size, rate in rates.items()},
            "floor_ms": {size: 1e3 * flops / rate for size, rate in rates.items()},
            "step_over_floor": {
                size: statistics.median(time.seconds * time.rates[size] for time in times) / flops
                for size in RATE_SIZES
            },
        },
        arguments.out,
    )
    if arguments.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step(batch, 3, 100)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45))


if __name__ == "__main__":
    main()
