"""Compares classifiers on the shipped model's image encoder: logistic regression, an encoder frozen, one finetuned.

    python benchmarks/classification.py --images DIR --train train.csv --val val.csv --test test.csv
        [--only regression frozen finetuned] [--runs DIR] [--out FILE]

Tables have the columns image and label. Three classifiers learn from the training images:

regression: logistic regression on the mean over positions of the encoder's features of the image as it is,
    standardised; the strength of its weight decay is the one that is best on the validation images.
frozen, finetuned: recipes/classify_frozen.yaml and recipes/classify_finetuned.yaml, by the commands `opencoca train`
    and `opencoca evaluate classification`; the validation images choose the best weights.

Prints top-1 accuracy on the test images, and minutes. Started again, it continues: complete runs are not trained again.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import report
from torch import Tensor

import opencoca

RECIPES = Path(__file__).parents[1] / "recipes"
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    for name in ("train", "val", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="table with the columns image and label")
    parser.add_argument("--only", nargs="+", choices=["regression", "frozen", "finetuned"])
    parser.add_argument("--runs", type=Path, default=Path("runs/classification"))
    parser.add_argument("--out", help="also writes the result there, as JSON")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    chosen = arguments.only or ["regression", "frozen", "finetuned"]
    found: dict[str, Any] = {}
    if "regression" in chosen:
        found["regression"] = regression(arguments)
    for name in [name for name in chosen if name != "regression"]:
        found[name] = trained(arguments, name)
    report({"command": " ".join(sys.argv), "classifiers": found}, arguments.out)


def regression(arguments: argparse.Namespace) -> dict[str, Any]:
    """The best of some strengths of weight decay."""
    began = time.monotonic()
    features, labels = {}, {}
    for part in ("train", "val", "test"):
        with open(getattr(arguments, part), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        features[part] = mean_features(arguments, part, [row["image"] for row in rows])
        labels[part] = [row["label"] for row in rows]
    names = sorted(set(labels["train"]))
    mean, std = features["train"].mean(0), features["train"].std(0).clamp_min(1e-6)
    inputs = {part: (x - mean) / std for part, x in features.items()}
    targets = {part: torch.tensor([names.index(label) for label in found]) for part, found in labels.items()}
    best: tuple[float, float, float] | None = None
    for decay in DECAYS:
        weight, bias = logistic_regression(inputs["train"], targets["train"], len(names), decay)
        right = {part: accuracy(inputs[part] @ weight + bias, targets[part]) for part in ("val", "test")}
        print(
            f"regression, weight decay {decay:g}: {100 * right['val']:.1f}% of the validation images", file=sys.stderr
        )
        if best is None or right["val"] > best[0]:
            best = right["val"], right["test"], decay
    assert best is not None
    minutes = (time.monotonic() - began) / 60
    return {"top1": best[1], "val_top1": best[0], "weight_decay": best[2], "minutes": round(minutes, 1)}


def mean_features(arguments: argparse.Namespace, part: str, images: list[str]) -> Tensor:
    """(N, C) in float64; kept in a file, because they take minutes."""
    kept = arguments.runs / f"features-{part}.pt"
    if kept.exists():
        return torch.load(kept, weights_only=True)
    pipeline = opencoca.load()
    rows = []
    with torch.inference_mode():
        for start in range(0, len(images), 32):
            pixels = pipeline.preprocess([arguments.images / name for name in images[start : start + 32]])
            rows.append(pipeline.model.image_features(pixels.to(pipeline.device)).mean(1).double().cpu())
            print(f"\rfeatures: {start}/{len(images)}", end="", file=sys.stderr)
    found = torch.cat(rows)
    torch.save(found, kept)
    return found


def logistic_regression(inputs: Tensor, targets: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Weight (C, classes) and bias that minimise the mean cross-entropy and decay / 2 times the weight's squares."""
    weight = torch.zeros(inputs.shape[1], classes, dtype=inputs.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=inputs.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(inputs @ weight + bias, targets) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def accuracy(logits: Tensor, targets: Tensor) -> float:
    return (logits.argmax(1) == targets).double().mean().item()


def trained(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """What the recipe gives, trained from the start or continued."""
    folder, scores = arguments.runs / name, arguments.runs / f"{name}.json"
    began = time.monotonic()
    tables = {"train": arguments.train, "val": arguments.val}
    data = [f"--data.{part}_{key}" for part in tables for key in ("images", "labels")]
    values = [str(value) for table in tables.values() for value in (arguments.images, table)]
    options = [text for pair in zip(data, values, strict=True) for text in pair]
    run("train", str(RECIPES / f"classify_{name}.yaml"), "--output", str(folder), *options)
    minutes = (time.monotonic() - began) / 60
    test = ["--images", str(arguments.images), "--labels", str(arguments.test)]
    run("evaluate", "classification", "--model", str(folder), *test, "--out", str(scores))
    metrics = json.loads(scores.read_text(encoding="utf-8"))["metrics"]
    return metrics | {"minutes": round(minutes, 1)}


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "opencoca", *arguments], check=True)


if __name__ == "__main__":
    main()
