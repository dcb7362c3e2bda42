"""Keeps the captions that fit their images best, as a trained model sees it.

    python scripts/filter_captions.py captions.csv better.csv --images FOLDER --keep 0.667

For captions of which many do not fit, such as those of video clips, of which a frame shows a part. Each gets the
similarity (cosine) of its embedding and the image's; those below the quantile are left out, the rest stay in order.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import opencoca

_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path, help="a CSV file with the columns image and caption")
    parser.add_argument("output", type=Path, help="the CSV file to write, with the columns of the other")
    parser.add_argument("--images", type=Path, required=True, help="the folder that the images' names are relative to")
    parser.add_argument("--keep", type=float, default=0.667, help="the share of captions to keep (0.667)")
    parser.add_argument("--model", help="a model's name or folder (the one that ships)")
    options = parser.parse_args()
    if not 0 < options.keep <= 1:
        parser.error(f"--keep {options.keep} must be more than 0 and at most 1")
    with options.captions.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns, rows = list(reader.fieldnames or ()), list(reader)
    if missing := [column for column in ("image", "caption") if column not in columns]:
        sys.exit(f"{options.captions} has no column {missing[0]!r}; it has {', '.join(columns)}")
    pipeline = opencoca.load(options.model) if options.model else opencoca.load()
    images = list(dict.fromkeys(row["image"] for row in rows))
    of_image = {}
    for start in tqdm(range(0, len(images), _BATCH), unit="batch", leave=False):
        some = images[start : start + _BATCH]
        embeds = pipeline.embed_images([options.images / image for image in some], batch_size=_BATCH)
        of_image |= dict(zip(some, embeds.numpy(), strict=True))
    texts = pipeline.embed_texts([row["caption"] for row in rows], progress=True).numpy()
    similarity = np.array([of_image[row["image"]] @ text for row, text in zip(rows, texts, strict=True)])
    least = np.quantile(similarity, 1 - options.keep)
    kept = [row for row, value in zip(rows, similarity, strict=True) if value >= least]
    with options.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(kept)
    print(f"{options.output}: {len(kept):,} of {len(rows):,} captions, of similarity {least:.3f} or more")


if __name__ == "__main__":
    main()
