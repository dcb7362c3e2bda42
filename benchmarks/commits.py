"""Two checkouts of this project against each other, in turn on one machine: training, captions, start of the command.

    python benchmarks/commits.py OLD NEW [--rounds 3] [--only NAME ...] [--images DIR --captions FILE] [--out FILE]

Every measurement is a process of its own, old and new in turn, `--rounds` times; the ratio is that of the medians over
all rounds. Only the command line and `opencoca.load` are used, which any two commits have in common.

train_fp32, train_bf16: a step of a coca_ViT-B-32, batch 16, by `opencoca train` from image files.
train_cached: a step of recipes/flickr8k.yaml, on stored features of the first --cached-images photographs.
greedy, beams: captions of 8 images by a coca_ViT-B-32 with random weights, greedy and with 6 beams, 30 tokens each.
folder: `opencoca caption DIR --out FILE` for a folder of photographs, with the shipped model: the whole process.
help, models, caption: `opencoca --help`, `opencoca models`, `opencoca caption PHOTO`: the whole process.

Without --images and --captions (columns image and caption), photographs and captions are generated. --out writes the
figures as JSON, and the table beside it as Markdown; both are written anew after every measurement.
"""

import argparse
import csv
import json
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from checkouts import Checkout
from commits_material import generate_photographs, open_clip_tensors
from common import machine
from safetensors.torch import save_file

TOLERANCE = 0.05
"""So much slower than the old checkout the new one may be."""


class Case(NamedTuple):
    """One side of a comparison: which checkout, and with what it is measured.

    config: of the network in ``b32``, as this checkout's recipes spell it. photographs: the folder that is captioned.
    b32: folder of a coca_ViT-B-32; tokenizer: file of the shipped model's vocabulary; both are the old checkout's.
    """

    name: str
    checkout: Checkout
    config: dict[str, Any]
    work: Path
    options: argparse.Namespace

    @property
    def photographs(self) -> Path:
        return self.work / "photographs"

    @property
    def b32(self) -> Path:
        return self.work / "b32"

    @property
    def tokenizer(self) -> Path:
        return self.work / "tokenizer.json"


class Measurement(NamedTuple):
    """measure: what one process, or a few equal ones, took, in the unit."""

    unit: str
    measure: Callable[[Case], list[float]]
    more_is_better: bool = False


def prepare(options: argparse.Namespace, work: Path) -> list[Case]:
    """Makes what is measured with; the two sides."""
    if options.images is None:
        options.images, options.captions = work / "images", work / "captions.csv"
        generate_photographs(options.images, options.captions, max(options.cached_images, options.folder_images, 256))
    old, new = Checkout(options.old.resolve()), Checkout(options.new.resolve())
    for checkout in (old, new):
        checkout.check()
    case = Case("old", old, {}, work, options)
    case.photographs.mkdir()
    for file in sorted(options.images.glob("*.jpg"))[: options.folder_images]:
        shutil.copy(file, case.photographs)
    torch.manual_seed(0)
    save_file(open_clip_tensors(), weights := work / "b32.safetensors")
    old.run("convert", "open_clip", "coca_ViT-B-32", str(weights), str(case.b32))
    old.ask("save_tokenizer", case.tokenizer)
    return [
        Case(name, checkout, checkout.ask("model_config", case.b32), work, options)
        for name, checkout in (("old", old), ("new", new))
    ]


# --- measurements ---


def train_b32(precision: str) -> Callable[[Case], list[float]]:
    def measure(case: Case) -> list[float]:
        recipe = case.work / "b32.yaml"
        values = {"model": case.config, "tokenizer": {"source": "clip"}, "batch_size": 16, "precision": precision}
        recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
        return step_ms(case, recipe, {"data.train_captions": case.options.captions})

    return measure


def train_cached(case: Case) -> list[float]:
    with open(case.options.captions, encoding="utf-8", newline="") as file:
        rows = [(row["image"], row["caption"]) for row in csv.DictReader(file)]
    first = set(list(dict.fromkeys(image for image, _ in rows))[: case.options.cached_images])
    captions = case.work / "cached.csv"
    with open(captions, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *(row for row in rows if row[0] in first)])
    options = {
        "data.train_captions": captions,
        "tokenizer.source": case.tokenizer,
        "encoder.cache_views": 1,
        "encoder.cache_dir": case.work / f"features_{case.name}",
    }
    return step_ms(case, case.checkout.folder / "recipes/flickr8k.yaml", options)


def step_ms(case: Case, recipe: Path, options: dict[str, Any]) -> list[float]:
    """Milliseconds of each step after the first ones, as the run itself notes them."""
    run, asked = case.work / "run", case.options
    options |= {"data.train_images": asked.images, "output": run, "device": "cpu", "log_every_steps": 1}
    options |= {"max_steps": asked.warmup + asked.steps, "epochs": 1000, "validate_every_epochs": 1000}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    case.checkout.run("train", str(recipe), *words, *shlex.split(asked.train_options))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(run)
    return [line["step_ms"] for line in lines if line["kind"] == "train"][asked.warmup :]


def captions(beams: int) -> Callable[[Case], list[float]]:
    return lambda case: case.checkout.ask("caption_seconds", case.b32, beams, case.options.tokens, 3)


def folder_rate(case: Case) -> list[float]:
    out = case.work / "folder.jsonl"
    seconds = case.checkout.run("caption", str(case.photographs), "--device", "cpu", "--out", str(out), "--overwrite")
    return [len(out.read_text(encoding="utf-8").splitlines()) / seconds]


def start(*command: str) -> Callable[[Case], list[float]]:
    def measure(case: Case) -> list[float]:
        words = [str(min(case.photographs.iterdir())) if word == "PHOTO" else word for word in command]
        case.checkout.run(*words)  # so that its files are in memory
        return [case.checkout.run(*words) for _ in range(3)]

    return measure


MEASUREMENTS = {
    "train_fp32": Measurement("ms", train_b32("fp32")),
    "train_bf16": Measurement("ms", train_b32("bf16")),
    "train_cached": Measurement("ms", train_cached),
    "greedy": Measurement("s", captions(beams=1)),
    "beams": Measurement("s", captions(beams=6)),
    "folder": Measurement("images/s", folder_rate, more_is_better=True),
    "help": Measurement("s", start("--help")),
    "models": Measurement("s", start("models")),
    "caption": Measurement("s", start("caption", "PHOTO", "--device", "cpu")),
}


# --- the comparison ---


def compare(name: str, cases: list[Case], count: int) -> dict[str, Any]:
    """The medians of both sides, their ratio, and what each round gave."""
    measurement = MEASUREMENTS[name]
    rounds: dict[str, list[list[float]]] = {case.name: [] for case in cases}
    for number in range(count):
        for case in cases:
            found = measurement.measure(case)
            rounds[case.name].append(found)
            print(f"{name}, round {number + 1}, {case.name}: {statistics.median(found):.4g}", file=sys.stderr)
    row: dict[str, Any] = {"unit": measurement.unit}
    row |= {
        side: statistics.median(value for found in all_rounds for value in found) for side, all_rounds in rounds.items()
    }
    row["new_over_old"] = row["new"] / row["old"]
    times_as_slow = 1 / row["new_over_old"] if measurement.more_is_better else row["new_over_old"]
    return row | {"within_tolerance": times_as_slow <= 1 + TOLERANCE, "rounds": rounds}


def table(result: dict[str, Any]) -> str:
    """The ratios as Markdown, and below them the machine."""
    lines = ["| | unit | old | new | new / old | at most 5% slower |", "|---|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        figures = f"{row['old']:.4g} | {row['new']:.4g} | {row['new_over_old']:.3f}"
        lines.append(f"| {name} | {row['unit']} | {figures} | {'yes' if row['within_tolerance'] else '**no**'} |")
    facts, commits = result["machine"], result["commits"]
    processor = f"{facts['cores']} cores of {facts['cpu']}, {'with' if facts['amx'] else 'without'} AMX"
    software = f"torch {facts['torch']}, {facts['threads']} threads"
    return "\n".join(
        [*lines, "", f"old {commits['old']}, new {commits['new']}; {processor}; {software}; {facts['date']}."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout to compare with")
    parser.add_argument("new", type=Path, help="checkout that must not be slower")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), metavar="NAME")
    parser.add_argument("--images", type=Path, help="folder of JPEG photographs")
    parser.add_argument("--captions", type=Path, help="their captions: CSV of image and caption")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a training process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--train-options", default="", help="more options of all training, for trials of this script")
    parser.add_argument("--tokens", type=int, default=30, help="of each of the 8 captions")
    parser.add_argument("--folder-images", type=int, default=256)
    parser.add_argument("--cached-images", type=int, default=960)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if (options.images is None) != (options.captions is None):
        parser.error("--images and --captions go together")
    data = " --images DIR --captions FILE" if options.images else ""
    counts = f"--rounds {options.rounds} --steps {options.steps} --tokens {options.tokens}{data}"
    command = f"python benchmarks/commits.py OLD NEW {counts}"
    result: dict[str, Any] = {"command": command, "commits": {}, "rows": {}}
    result["machine"] = machine() | {"amx": "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8")}
    with tempfile.TemporaryDirectory() as work:
        cases = prepare(options, Path(work))
        result["commits"] = {case.name: case.checkout.commit() for case in cases}
        for name in options.only:
            result["rows"][name] = compare(name, cases, options.rounds)
            if options.out:
                options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
                text = f"# Two commits against each other\n\n```\n{command}\n```\n\n{table(result)}\n"
                options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
