"""Does one model learn both better than either alone? The paper's claim, at a small size, over several seeds.

    python benchmarks/objectives.py --images DIR --train train.csv --val val.csv [--seeds 0 1 2] [--out FILE]

Trains recipes/objectives.yaml with both losses, with the contrastive loss alone and with the captioning loss alone,
and prints retrieval and captioning scores of the validation set for each: mean and range over the seeds.
"""

import argparse
import statistics
from pathlib import Path

from common import report

from opencoca.train import load_recipe, train
from opencoca.train.report.metrics_log import read_metrics

OBJECTIVES = {"both": (1.0, 2.0), "contrastive alone": (1.0, 0.0), "captioning alone": (0.0, 2.0)}
SCORES = ("image_to_text_r1", "text_to_image_r1", "cider_d", "bleu_4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--recipe", default="recipes/objectives.yaml")
    parser.add_argument("--runs", default="runs/objectives", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out")
    arguments = parser.parse_args()

    data = ["--data.train_images", arguments.images, "--data.train_captions", arguments.train]
    data += ["--data.val_images", arguments.images, "--data.val_captions", arguments.val]
    table: dict[str, dict] = {}
    for name, (contrastive, caption) in OBJECTIVES.items():
        runs = []
        for seed in arguments.seeds:
            folder = Path(arguments.runs) / f"{name.replace(' ', '_')}_{seed}"
            options = [*data, "--output", str(folder), "--encoder.cache_dir", str(Path(arguments.runs) / "features")]
            options += ["--seed", str(seed), "--loss.contrastive_weight", str(contrastive)]
            train(load_recipe(arguments.recipe, [*options, "--loss.caption_weight", str(caption)]))
            lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "validation"]
            runs.append({score: lines[-1][score] for score in SCORES if score in lines[-1]})
        table[name] = {
            score: {
                "mean": statistics.mean(run[score] for run in runs),
                "min": min(run[score] for run in runs),
                "max": max(run[score] for run in runs),
            }
            for score in SCORES
            if score in runs[0]
        }
    report({"recipe": arguments.recipe, "seeds": arguments.seeds, "objectives": table}, arguments.out)


if __name__ == "__main__":
    main()
