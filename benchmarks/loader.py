"""Training batches from tar shards: images per second per core, OpenCoCa against webdataset and open_clip's loader.

    opencoca data pack --images DIR/images --captions DIR/train.csv --out SHARDS --samples-per-shard 500
    python benchmarks/loader.py --shards SHARDS [--images 2000] [--rounds 3] [--peers SITE-PACKAGES] [--out FILE]

All ways read the same shards, crop at random (90 to 100% of the area), resize to 224 x 224 with Pillow's bicubic filter
and give normalised float32 batches of 64 images; OpenCoCa and open_clip also tokenise a caption an image. Each
measurement is a process of its own that loads in itself with one thread. Seconds are those that the processor worked,
so a busy machine disturbs little: images a second of it is what one core delivers. Ways take turns, `rounds` times.
Pillow alone, on bytes in memory, is the bound: decode, crop and resize, and nothing else.

webdataset, pandas and open_clip_torch (with torchvision) must be installed, for example the first two into what
scripts/make_peers_env.sh makes, which has the rest; --peers adds the site-packages of another environment.
"""

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WAYS = (
    "Pillow alone",
    "OpenCoCa",
    "OpenCoCa, large images",
    "webdataset + Pillow",
    "open_clip",
    "Pillow alone, large images",
    "open_clip, large images",
    "webdataset + Pillow, large images",
)
SIZE, BATCH, SCALE = 224, 64, (0.9, 1.0)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="folder of tar shards")
    parser.add_argument("--large-shards", type=Path, help="folder of shards with large photographs")
    parser.add_argument("--images", type=int, default=2000, help="images a measurement (default: 2000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", help="site-packages that have webdataset and open_clip")
    parser.add_argument("--out")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peers:
        sys.path.append(arguments.peers)
    if arguments.measure:
        print(json.dumps(measure(arguments)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    from common import report

    ways = [way for way in WAYS if arguments.large_shards or not way.endswith("large images")]
    rates: dict[str, list[float]] = {way: [] for way in ways}
    walls: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way in ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", way]
            output = subprocess.check_output(command, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            result = json.loads(output.splitlines()[-1])
            rates[way].append(result["images"] / result["processor_seconds"])
            walls[way].append(result["images"] / result["seconds"])
    results = {
        way: {
            "images_per_processor_second": statistics.median(rates[way]),
            "images_per_second": statistics.median(walls[way]),
            "all_images_per_processor_second": rates[way],
        }
        for way in ways
    }
    report({"images": arguments.images, "size": SIZE, "batch": BATCH, "ways": results}, arguments.out)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    name, _, large = arguments.measure.partition(", ")
    shards = sorted(map(str, (arguments.large_shards if large else arguments.shards).glob("*.tar")))
    makers = {"OpenCoCa": opencoca, "webdataset + Pillow": webdataset, "open_clip": open_clip, "Pillow alone": pillow}
    batches = makers[name](shards)
    next(batches)  # what is set up at first use
    images, start, processor_start = 0, time.perf_counter(), time.process_time()
    while images < arguments.images:
        images += next(batches)
    return {
        "images": images,
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor_start,
    }


def opencoca(shards: list[str]) -> Iterator[int]:
    from opencoca.data import PreprocessConfig, TarShards, TrainingLoader, TrainTransform, make_order
    from opencoca.tokenizer import Tokenizer

    source = TarShards(shards)
    transform = TrainTransform(PreprocessConfig((SIZE, SIZE)), scale=SCALE, flip_probability=0.0)
    order = make_order(source, 0, by_blocks=True)
    for batch in TrainingLoader(source, Tokenizer.clip(), transform, order, BATCH, 1, 76, 0).batches():
        assert batch.images is not None
        yield len(batch.images)


def webdataset(shards: list[str]) -> Iterator[int]:
    import torch
    import webdataset as wds

    def prepare(image: Any) -> torch.Tensor:
        return normalized(crop(image))

    data = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pilrgb")
    pipeline = data.to_tuple("jpg;jpeg;png", "txt").map_tuple(prepare, str).batched(BATCH, partial=False)
    while True:
        for pixels, _ in pipeline:
            yield len(pixels)


def open_clip(shards: list[str]) -> Iterator[int]:
    from common import import_open_clip

    oc = import_open_clip()
    data = import_open_clip("open_clip_train.data")
    transform = import_open_clip("open_clip.transform").image_transform(
        SIZE, is_train=True, mean=MEAN, std=STD, aug_cfg={"scale": SCALE}
    )
    options = SimpleNamespace(
        train_data="{" + ",".join(shards) + "}" if len(shards) > 1 else shards[0],
        train_data_upsampling_factors=None,
        train_num_samples=100_000,
        val_data=None,
        dataset_resampled=True,
        seed=0,
        batch_size=BATCH,
        world_size=1,
        workers=0,
        distributed=False,
        use_tokenizer=True,
    )
    info = data.get_wds_dataset(options, transform, is_train=True, tokenizer=oc.get_tokenizer("coca_ViT-B-32"))
    for epoch in range(100):
        info.set_epoch(epoch)
        for images, _ in info.dataloader:
            yield len(images)


def pillow(shards: list[str]) -> Iterator[int]:
    from PIL import Image

    photos: list[bytes] = []
    for shard in shards[:4]:
        with tarfile.open(shard) as archive:
            files = [member for member in archive if member.name.endswith((".jpg", ".jpeg"))]
            photos += [archive.extractfile(member).read() for member in files]  # type: ignore[union-attr]
    while True:
        for photo in random.sample(photos, min(BATCH, len(photos))):
            crop(Image.open(io.BytesIO(photo)).convert("RGB"))
        yield min(BATCH, len(photos))


def crop(image: Any) -> Any:
    """A random crop of 90 to 100% of the area, resized by Pillow in one go."""
    from PIL import Image

    share = random.uniform(*SCALE) ** 0.5
    width, height = round(image.width * share), round(image.height * share)
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)


def normalized(image: Any) -> Any:
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return pixels.sub_(mean).div_(std)


if __name__ == "__main__":
    main()
