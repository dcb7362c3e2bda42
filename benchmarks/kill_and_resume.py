"""Kills a short training run again and again, and shows that what comes out of it is the same to the last bit.

    python benchmarks/kill_and_resume.py --kills 20 --ranks 1 2 [--task classification]
        [--out results/kill_and_resume.json]

One run is left alone; another, of the same recipe, gets SIGKILL at random moments: in any step, and, every other time,
while a checkpoint is being written. Of several processes (gloo, by torchrun) one dies, which torchrun notices and
repairs by starting all again, or all die with torchrun, and the same command is given again. Then every tensor of the
last checkpoints (weights, optimizer, moving average, every process's random states), the kept model and the metrics,
without those that are times, must be equal.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import report
from PIL import Image

from opencoca.train.checkpoints.folder import CheckpointFolder
from opencoca.train.checkpoints.reader import CheckpointReader

_TIMES = {"images_per_sec", "tokens_per_sec", "step_ms", "data_wait_ms"}
_TIMES |= {"model_flops_per_sec", "model_flops_utilisation", "memory_bytes"}
_DEADLINE_S = 1800.0


@dataclass(frozen=True)
class Kill:
    """target: one or all. while_writing: a checkpoint was half-written then. latest: the one that was complete."""

    target: str
    while_writing: bool
    latest: str
    after_s: float


TASKS = {
    "pretraining": {"name": "pretraining", "select_by": "loss", "max_new_tokens": 4},
    "classification": {"name": "classification", "label_smoothing": 0.1, "class_weights": "balanced"},
}


def write_recipe(folder: Path, output: Path, steps: int, strategy: str, task: str) -> Path:
    """A recipe of a tiny model on drawn images, with all that is random and all that is kept."""
    images = folder / "images"
    if not images.is_dir():
        images.mkdir(parents=True)
        things, places = ("dog", "cat", "boat", "tree", "child", "bus"), ("in the snow", "by a river", "on the sand")
        rows, classes = [], []
        for number in range(24):
            blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize((40, 40), Image.Resampling.NEAREST).save(images / f"{number}.png")
            rows += [(f"{number}.png", f"a {things[number % 6]} {place} number {number}") for place in places]
            classes.append((f"{number}.png", things[number % 6]))
        for name, column, lines in (("captions", "caption", rows), ("labels", "label", classes)):
            with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("image", column), *lines])
    text = {"context_length": 24, "width": 64, "unimodal_depth": 1, "multimodal_depth": 1, "num_heads": 2}
    image = {"image_size": [32, 32], "patch_size": 8, "width": 64, "depth": 2, "num_heads": 2, "mlp_width": 128}
    texts = "captions" if task == "pretraining" else "labels"
    recipe = {
        "output": str(output),
        "task": TASKS[task],
        "size": "tiny",
        "model": {
            "embed_dim": 32,
            "image": image | {"dropout": 0.1},
            "pooler": {"num_queries": 4, "num_heads": 2},
            "text": text | {"mlp_width": 128, "dropout": 0.1},
        },
        "data": {
            "train_images": str(images),
            f"train_{texts}": str(folder / f"{texts}.csv"),
            "val_images": str(images),
            f"val_{texts}": str(folder / f"{texts}.csv"),
            "captions_per_image": 2 if texts == "captions" else 1,
            "resize_mode": "squash",
            "num_workers": 1,
        },
        "tokenizer": {"source": "train", "vocab_size": 330, "min_frequency": 1} if texts == "captions" else {},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10, "ema_decay": 0.99},
        "distributed": {"strategy": strategy},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
        "epochs": 10_000,
        "max_steps": steps,
        "batch_size": 8,
        "precision": "fp32",
        "device": "cpu",
        "validate_every_epochs": 20,
        "log_every_steps": 3,
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


class Run:
    """A training run as a user starts it, and starts again."""

    def __init__(self, recipe: Path, output: Path, ranks: int):
        self.output, self.ranks = output, ranks
        self.command = [sys.executable, "-m"]
        if ranks > 1:
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1000"]
            self.command += [*launcher, "-m"]
        self.command += ["opencoca", "train", str(recipe)]
        self.log = open(output.with_suffix(".log"), "a", encoding="utf-8")  # noqa: SIM115
        self.process: subprocess.Popen[str] | None = None
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def has_ended(self) -> bool:
        """Whether it is through; raises if it ended otherwise than by being killed."""
        assert self.process is not None
        code = self.process.poll()
        if code not in (None, 0):
            raise RuntimeError(f"the run ended with {code}; see {self.log.name}")
        return code == 0

    def kill(self, target: str, chooser: random.Random) -> None:
        assert self.process is not None
        workers = children(self.process.pid) if self.ranks > 1 else [self.process.pid]
        if target == "one" and self.ranks > 1:
            kill(chooser.choice(workers))
            return
        for pid in descendants(self.process.pid):
            kill(pid)
        self.process.wait()
        self.start()

    def writes_now(self) -> bool:
        return any((self.output / "checkpoints").glob(".step-*.partial"))

    def latest(self) -> str:
        try:
            return (self.output / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def latest_step(self) -> int:
        return int(self.latest().removeprefix("step-") or 0)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """This process and all below it."""
    return [pid, *(found for child in children(pid) for found in descendants(child))]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def torture(run: Run, kills: int, steps_apart: int, seed: int, targets: tuple[str, ...]) -> list[Kill]:
    """Runs to the end, with kills on the way: at most ``steps_apart`` steps, and a random moment, after the last.

    Counted in steps and not in seconds, so that a fast machine is not through before all kills are done.
    """
    chooser, done = random.Random(seed), []
    deadline = time.monotonic() + _DEADLINE_S
    run.start()
    while not run.has_ended():
        if len(done) == kills:
            time.sleep(0.05)
            continue
        began, wants_writing = time.monotonic(), len(done) % 2 == 1
        step = run.latest_step() + chooser.randint(1, steps_apart)
        wait_until(lambda: run.has_ended() or run.latest_step() >= step, deadline)  # noqa: B023
        if wants_writing:
            wait_until(lambda: run.has_ended() or run.writes_now(), deadline)
        time.sleep(chooser.uniform(0, 0.005))
        if run.has_ended():
            break
        target = chooser.choice(targets)
        writing, latest = run.writes_now(), run.latest()
        run.kill(target, chooser)
        done.append(Kill(target, writing, latest, round(time.monotonic() - began, 2)))
    return done


def wait_until(condition: Any, deadline: float) -> None:
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the run made no progress")
        time.sleep(0.001)


def final_state(output: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """All tensors of the last checkpoint and of the kept model, and the lines of the metrics without times."""
    folder = CheckpointFolder(output / "checkpoints")
    reader = CheckpointReader(folder.path / str(folder.to_try()[0]))
    reader.check(0, 1)
    tensors = {key: reader.read(key) for key in reader.keys}
    for rank in range(len(reader.index.files)):
        tensors |= {f"random/{rank}/{name}": value for name, value in reader.random_state(rank).items()}
    model = (output / "model.safetensors").read_bytes()
    tensors["model.safetensors"] = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return tensors, [{key: value for key, value in line.items() if key not in _TIMES} for line in lines]


def compare(arguments: argparse.Namespace, ranks: int, folder: Path) -> dict[str, Any]:
    """One run left alone and one that is killed, and whether they are equal."""
    strategy, kills, seed, targets = arguments.strategy, arguments.kills, arguments.seed, tuple(arguments.targets)
    steps = 20 + kills * arguments.steps_per_kill
    outputs = [folder / f"{name}-{ranks}-{strategy}" for name in ("alone", "killed")]
    recipes = [write_recipe(folder, output, steps, strategy, arguments.task) for output in outputs]
    alone, killed = (Run(recipe, output, ranks) for recipe, output in zip(recipes, outputs, strict=True))
    torture(alone, 0, 0, seed, targets)
    began = time.monotonic()
    # Half of the steps are for the kills; the others for what is before the first, and for a killer that is late.
    done = torture(killed, kills, max(1, steps // (2 * kills + 1)), seed, targets)
    (expected, expected_lines), (found, found_lines) = final_state(outputs[0]), final_state(outputs[1])
    differing = [key for key in expected if key not in found or not torch.equal(found[key], expected[key])]
    return {
        "task": arguments.task,
        "processes": ranks,
        "strategy": strategy if ranks > 1 else "none",
        "steps": steps,
        "kills": len(done),
        "kills_of_one": sum(kill.target == "one" for kill in done) if ranks > 1 else 0,
        "kills_while_writing": sum(kill.while_writing for kill in done),
        "finished": True,
        "tensors_compared": len(expected),
        "tensors_differing": differing + sorted(found.keys() - expected.keys()),
        "metric_lines_compared": len(expected_lines),
        "metric_lines_equal": found_lines == expected_lines,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "each": [asdict(kill) for kill in done],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"], help="of several processes")
    parser.add_argument("--task", default="pretraining", choices=TASKS, help="what the runs train")
    parser.add_argument("--steps-per-kill", type=int, default=20, help="the run's length")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--targets", nargs="+", default=["one", "all"], choices=["one", "all"], help="what dies")
    parser.add_argument("--out", help="also writes the result there, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(arguments, ranks, Path(folder)) for ranks in arguments.ranks]
    report({"command": " ".join(sys.argv), "runs": results}, arguments.out)
    equal = all(not run["tensors_differing"] and run["metric_lines_equal"] for run in results)
    sys.exit(0 if equal and all(run["kills"] == arguments.kills for run in results) else 1)


if __name__ == "__main__":
    main()
