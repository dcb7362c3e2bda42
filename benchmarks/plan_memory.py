"""`opencoca plan`'s memory forecast against the measured peak of training steps, on this machine's CPU.

    python benchmarks/plan_memory.py --output results/plan_memory.json

Each forecast and each measurement is a process of its own. A measurement takes two steps of the trainer's own code
on random pixels and words; its peak is what the system counts as the process's largest resident memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from common import machine

from opencoca.train import Recipe, load_recipe

STEPS = 2


@dataclass(frozen=True)
class Case:
    """A recipe's keys, and the mean number of words."""

    name: str
    keys: dict
    mean_words: float = 16.0


_BASE = {"device": "cpu", "optimizer": {"name": "adafactor"}, "size": "base"}
_LITE = {
    "size": "small",
    "model": {
        "embed_dim": 384,
        "image": {"name": "efficientnet_lite2", "image_size": [260, 260]},
        "pooler": {"num_queries": 0, "num_heads": 6},
        "text": {"context_length": 40, "width": 384, "unimodal_depth": 3, "multimodal_depth": 3, "num_heads": 6,
                 "mlp_width": 1536, "tie_embeddings": True, "dropout": 0.2},
    },
    "data": {"captions_per_image": 5},
    "tokenizer": {"source": "train", "vocab_size": 5000},
    "optimizer": {"ema_decay": 0.99},
}  # fmt: skip
CASES = [
    Case("tiny, 64 images, fp32", {"size": "tiny", "batch_size": 64, "precision": "fp32"}),
    Case("tiny, 64 images, bf16", {"size": "tiny", "batch_size": 64}),
    Case("tiny, 256 images, bf16, GradCache 4", {"size": "tiny", "batch_size": 256, "grad_cache_steps": 4}),
    Case("small, 32 images, fp32", {"size": "small", "batch_size": 32, "precision": "fp32"}),
    Case("small, 32 images, bf16", {"size": "small", "batch_size": 32}),
    Case("small, 32 images, bf16, recompute all", {"size": "small", "batch_size": 32, "compute": {"recompute": "all"}}),
    Case("small, 32 images, bf16, averaged", {"size": "small", "batch_size": 32, "optimizer": {"ema_decay": 0.99}}),
    Case("EfficientNet-Lite2, 32 images of 5 captions, bf16", _LITE | {"batch_size": 32}),
    Case("base, 4 images, bf16, Adafactor", _BASE | {"batch_size": 4}),
    Case("base, 8 images, fp32, Adafactor, recompute all",
         _BASE | {"batch_size": 8, "precision": "fp32", "compute": {"recompute": "all"}}),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--measured", help="JSON file of an earlier run, whose measurements are taken over")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, number = arguments.child
        print(json.dumps((_forecast if kind == "forecast" else _measure)(CASES[int(number)])))
        return
    earlier = json.loads(Path(arguments.measured).read_text())["rows"] if arguments.measured else []
    known = {row["name"]: {key: row[key] for key in ("measured_bytes", "before_bytes")} for row in earlier}
    rows = []
    for number, case in enumerate(CASES):
        if arguments.only and arguments.only not in case.name:
            continue
        measured = known.get(case.name) or _child("measure", number)
        row = {"name": case.name, **_child("forecast", number), **measured}
        row["error_percent"] = 100 * (row["forecast_bytes"] / row["measured_bytes"] - 1)
        rows.append(row)
        figures = " ".join(f"{row[key] / 2**30:.2f}" for key in ("forecast_bytes", "measured_bytes"))
        print(f"{case.name}: {figures} GiB, {row['error_percent']:+.1f} %", flush=True)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps({"rows": rows, "machine": machine()}, indent=2) + "\n")


def _child(kind: str, number: int) -> dict:
    command = [sys.executable, __file__, "--child", kind, str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _recipe(case: Case) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(case.keys))
        return load_recipe(path)


def _forecast(case: Case) -> dict:
    from opencoca.plan import Cluster, make_plan

    plan = make_plan(_recipe(case), Cluster(), mean_words=case.mean_words)
    memory = plan.chosen
    return {"forecast_bytes": memory.peak_bytes, "moment": memory.moment, "process_bytes": memory.process}


def _measure(case: Case) -> dict:
    import torch

    from opencoca.data import Batch
    from opencoca.model.coca import CoCa
    from opencoca.plan.planner import batch_of, likely_lengths, vocabulary_size
    from opencoca.system.allocator import keep_freed_memory
    from opencoca.system.memory_use import peak_bytes, resident_bytes
    from opencoca.train.compute import prepare_compute
    from opencoca.train.optim.optimizer import WeightAverage, build_optimizer
    from opencoca.train.step import TrainStep

    recipe, device = _recipe(case), torch.device("cpu")
    keep_freed_memory()
    before = resident_bytes()
    config = replace(recipe.model, text=replace(recipe.model.text, vocab_size=vocabulary_size(recipe)))
    model = CoCa(config).train()
    prepare_compute(model, recipe, device)
    average = WeightAverage(model, recipe.optimizer.ema_decay) if recipe.optimizer.ema_decay else None
    step = TrainStep(model, build_optimizer(model, recipe), average, recipe)
    texts = recipe.batch_size * recipe.data.captions_per_image
    lengths = likely_lengths(texts, case.mean_words, config.text.context_length)
    _, mask = batch_of(lengths[torch.randperm(texts)])
    for number in range(STEPS):
        images = torch.randn(recipe.batch_size, 3, *config.image.image_size)
        ids = torch.randint(5, config.text.vocab_size, mask.shape)
        step(Batch(torch.arange(recipe.batch_size), images, ids, mask), number, STEPS)
    return {"measured_bytes": peak_bytes(device), "before_bytes": before}


if __name__ == "__main__":
    main()
