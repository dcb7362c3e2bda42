"""Turns a training run into the model that ships with the package: half-precision weights and a model card.

    python scripts/ship_model.py RUN [--out src/opencoca/assets/models/coca-flickr8k]

Paths of the machine it was trained on are left out. The scores in the card and in scores.json, which `opencoca models`
prints, are those of the stored, half-precision weights: evaluate the new folder with `opencoca evaluate --out`, then
run this again with those files after --scores.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from opencoca.store.model_card import Result, readable_score, write_scores
from opencoca.store.model_folder import load_model_folder, save_model_folder
from opencoca.train.report.metrics_log import read_metrics

CARD = """# coca-flickr8k

A small CoCa ({parameters:.1f}M parameters) that captions, classifies, embeds and finds photographs: what
`opencoca.load()` loads. Images of 260 x 260 pixels (any image is resized to that), English, lower case.

| part | what |
|---|---|
| image encoder | EfficientNet-Lite2 ({encoder:.1f}M), 81 features; ImageNet weights, last three trained further |
| poolers | contrastive pooler of one query; the decoder looks at the image features themselves |
| text decoder | {unimodal} unimodal and {multimodal} multimodal layers of width {width}; {vocab} byte-pair tokens |

## Training

Recipe `recipes/flickr8k.yaml`: {epochs} epochs of {batch} images with five captions each ({steps} steps),
contrastive and captioning loss together, bf16, {minutes:.0f} minutes on {cores} CPU cores after the features of the
frozen stages had been stored (6 minutes). Best of the epochs' weights by CIDEr-D and R@1 on the validation images,
so that the scores below are those of the set it was chosen on.

## Data and licences

- **Flickr8k** (Hodosh, Young, Hockenmaier 2013): 6,000 training images with 30,000 captions, for research use. The
  photographs are their photographers'; none is part of this project.
- **ImageNet weights** of EfficientNet-Lite2: Apache-2.0 (Google; converted by ML Illustrated). ImageNet's images
  are for non-commercial research and education.
- The weights are offered under Apache-2.0 as far as the project can; consider the terms above before commercial
  use.

## Scores

Flickr8k validation, 1,000 images, greedy captions, percent.

{scores}

## Limits

It has seen 6,000 photographs of everyday scenes, mostly people and dogs outdoors, and speaks of other things in
these terms: a painting becomes a person, a rocket a man jumping. It does not read text, count well, or know names.
It repeats the biases of its captions, such as guessing gender, age and activity. Do not use it to judge people or
where errors do harm. Classification works for labels that its captions speak of.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("src/opencoca/assets/models/coca-flickr8k"))
    parser.add_argument("--scores", type=Path, nargs="*", default=[], help="JSON files of `opencoca evaluate --out`")
    parser.add_argument("--cores", type=int, default=2, help="that it was trained on, for the card")
    arguments = parser.parse_args()

    loaded = load_model_folder(arguments.run)
    recipe = without_paths(loaded.info["recipe"])
    info = {"recipe": recipe, "step": loaded.info["step"], "validation": loaded.info["validation"]}
    save_model_folder(arguments.out, loaded.model, loaded.tokenizer, loaded.preprocess, dtype=torch.float16, info=info)
    model, text = loaded.model, loaded.model.config.text
    results = [Result.read(file) for file in arguments.scores]
    lines = [line for line in read_metrics(arguments.run / "metrics.jsonl") if line["kind"] == "train"]
    seconds = sum(line["step_ms"] for line in lines) / 1e3 * recipe["log_every_steps"]
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        encoder=sum(p.numel() for p in model.image_encoder.parameters()) / 1e6,
        unimodal=text.unimodal_depth,
        multimodal=text.multimodal_depth,
        width=text.width,
        vocab=text.vocab_size,
        epochs=recipe["epochs"],
        batch=recipe["batch_size"],
        steps=lines[-1]["step"],
        minutes=seconds / 60,
        cores=arguments.cores,
        scores=score_table(results),
    )
    write_scores(arguments.out, "flickr8k", results)
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    print(f"{arguments.out}: {sum(file.stat().st_size for file in arguments.out.iterdir()) / 1e6:.1f} MB")


def without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the folders of the machine it ran on."""
    data = {key: value for key, value in recipe["data"].items() if not key.endswith(("_images", "_captions"))}
    encoder = {key: value for key, value in recipe["encoder"].items() if key != "cache_dir"}
    return {key: value for key, value in recipe.items() if key != "output"} | {"data": data, "encoder": encoder}


def score_table(results: list[Result]) -> str:
    """A table with a row for each metric."""
    rows = ["| metric | score |", "|---|---|"]
    for result in results:
        for name, value in result.metrics.items():
            rows.append(f"| {name} | {readable_score(name, value):{'g' if 'rank' in name else '.1f'}} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
