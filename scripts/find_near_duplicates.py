"""Which of the images to train on are kept for tests: by their names, and by what they look like.

    pip install imagehash  # brings SciPy
    python scripts/find_near_duplicates.py TRAIN_FOLDER ... --against TEST_FOLDER --names test_names.txt

An image looks like another if their perceptual hashes of 64 bits differ in few, or those of one and of the other's
mirror image. Pairs are printed as a table to look at, nearest first; found by name or by looks, the exit status is 1.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from opencoca.data import decode_image

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, nargs="+", help="folders of images, with all that lie in them")
    parser.add_argument("--against", type=Path, nargs="*", default=[], help="folders of images to keep out")
    parser.add_argument("--names", type=Path, help="a file with a file name a line, to keep out")
    parser.add_argument("--distance", type=int, default=6, help="how many of 64 bits may differ (6)")
    options = parser.parse_args()
    if not options.against and options.names is None:
        parser.error("name what is to be kept out: --against, --names or both")
    trained, found = [file for folder in options.train for file in _images(folder)], 0
    if options.names is not None:
        kept = {line.strip() for line in options.names.read_text(encoding="utf-8").splitlines()} - {""}
        same = [file for file in trained if file.name in kept]
        print(f"{len(trained):,} images, {len(kept):,} names kept out: {len(same)} have such a name")
        for file in same:
            print(f"{file}\tby its name")
        found += len(same)
    if options.against:
        kept_files = [file for folder in options.against for file in _images(folder)]
        pairs = sorted(_alike(trained, kept_files, options.distance))
        print(f"{len(trained):,} images against {len(kept_files):,}: {len(pairs)} pairs within {options.distance} bits")
        for distance, file, other in pairs:
            print(f"{file}\t{other}\t{distance} bits")
        found += len(pairs)
    sys.exit(1 if found else 0)


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        sys.exit(f"there is no folder {folder}")
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())


def _alike(train: list[Path], kept: list[Path], distance: int) -> Iterator[tuple[int, str, str]]:
    seen, (hashes, mirrored) = _hashes(train)[0], _hashes(kept)
    for file, one in zip(train, seen, strict=True):
        differ = np.minimum(*(np.bitwise_count(one ^ other) for other in (hashes, mirrored)))
        for index in np.flatnonzero(differ <= distance):
            if file != kept[index]:
                yield int(differ[index]), str(file), str(kept[index])


def _hashes(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hashes (N,) of images and of their mirror images, as 64-bit numbers."""
    try:
        from imagehash import phash
    except ImportError:
        sys.exit("this needs the package imagehash: pip install imagehash")

    def number(image: Image.Image) -> int:
        return int(str(phash(image)), 16)

    numbers = []
    for file in tqdm(files, unit="img", leave=False):
        image = decode_image(file.read_bytes(), name=str(file))
        numbers.append((number(image), number(ImageOps.mirror(image))))
    both = np.array(numbers, np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


if __name__ == "__main__":
    main()
