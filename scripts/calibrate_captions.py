"""Fits what gives captions their confidence to captions that a person judged, and says how well it keeps its word.

    python scripts/calibrate_captions.py JUDGED.csv --model FOLDER [--image-root DIR] [--write]

JUDGED.csv has the columns image (a file, relative to the table's folder or to --image-root), caption, and right (1 or
0). The captions should be those that this very model wrote, with the options that it is used with, for photographs
that it was not trained on; 200 of them or more. The table of reliability is of captions that the fit has not seen: of
five parts of the images, each is predicted by a fit to the other four. --write puts the three numbers of the fit to
all of them into the folder's config.json, from where `opencoca.load` reads them. They belong to these weights: judge
and fit again after any training.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import opencoca
from opencoca.evaluation.calibration import caption_scores, fit_calibration, held_out_confidences, reliability
from opencoca.generation.confidence import CaptionCalibration
from opencoca.store.model_folder import CONFIG_FILE
from opencoca.system.files import write_json
from opencoca.system.json_files import read_json

_RIGHT = {"1": 1, "0": 0, "yes": 1, "no": 0, "true": 1, "false": 0}


class Judged(NamedTuple):
    """A caption of an image, and whether a person called it right (1 or 0)."""

    image: Path
    caption: str
    right: int


def read_judged(table: Path, image_root: Path | None = None) -> list[Judged]:
    """Reads the table of judged captions.

    Raises ValueError for a column that is missing, a judgement that is neither 1 nor 0, or a table without rows.
    """
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    judged = []
    for number, row in enumerate(rows, start=2):
        if missing := [name for name in ("image", "caption", "right") if not row.get(name)]:
            raise ValueError(f"{table}, line {number}: nothing in the column {missing[0]}")
        right = _RIGHT.get(row["right"].strip().lower())
        if right is None:
            raise ValueError(f"{table}, line {number}: right is {row['right']!r}; it must be 1 or 0")
        judged.append(Judged((image_root or table.parent) / row["image"], row["caption"], right))
    if not judged:
        raise ValueError(f"{table} has no rows")
    return judged


def write_calibration(folder: Path, calibration: CaptionCalibration) -> None:
    """Puts a calibration into the info of a model's folder, in place of one that is there."""
    file = folder / CONFIG_FILE
    stored = read_json(file, file.stat().st_size)
    stored["info"].update(calibration.to_info())
    write_json(file, stored)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judged", type=Path, help="CSV file with the columns image, caption and right")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that wrote the captions")
    parser.add_argument("--image-root", type=Path, help="folder of the images (default: the table's)")
    parser.add_argument("--write", action="store_true", help="put the numbers into the model's config.json")
    arguments = parser.parse_args(argv)
    try:
        judged = read_judged(arguments.judged, arguments.image_root)
        pipeline = opencoca.load(arguments.model)
        rows = tqdm(judged, desc="scoring", unit="caption", disable=not sys.stderr.isatty())
        scores = torch.tensor([caption_scores(pipeline, row.image, row.caption) for row in rows], dtype=torch.float64)
        right = torch.tensor([row.right for row in judged])
        numbers = {image: number for number, image in enumerate(dict.fromkeys(row.image for row in judged))}
        groups = torch.tensor([numbers[row.image] for row in judged])
        calibration = fit_calibration(scores, right)
        show(calibration, held_out_confidences(scores, right, groups), right)
        if arguments.write:
            write_calibration(arguments.model, calibration)
    except (ValueError, OSError) as error:
        print(f"calibrate_captions: {error}", file=sys.stderr)
        return 2
    return 0


def show(calibration: CaptionCalibration, confidences: torch.Tensor, right: torch.Tensor) -> None:
    """Prints the three numbers, and the table of reliability."""
    print(f"{len(right)} captions, {right.double().mean():.1%} of them right")
    for name, value in calibration.to_info()["caption_calibration"].items():
        print(f"{name}: {value:.4f}")
    print("\n| predicted share | observed share | captions |\n|---|---|---|")
    for predicted, observed, count in reliability(confidences, right):
        print(f"| {predicted:.1%} | {observed:.1%} | {count} |")


if __name__ == "__main__":
    sys.exit(main())
