"""A folder of many photographs through `opencoca caption`: how much decoding costs beside the model, and what kills do.

    python benchmarks/recaption.py --photos DIR --work DIR [--count 20000] [--kills 20] [--rounds 8] [--out FILE]
        [--parts rates whole kills]

The folder is made of the given photographs: each is cropped, mirrored, resized and stored as JPEG in as many ways as it
takes. Three rates are measured in turn, so that other work on the machine meets them alike: decoding alone, the model
alone, and a run with both; then a run over the whole folder. That run is then done again by the command, killed with
SIGKILL at random moments and started again each time, and its files are compared byte by byte. --parts does some of
this only; kills are compared with the whole run that --work holds.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import report
from PIL import Image

import opencoca
from opencoca.data import EvalTransform, iterate_images
from opencoca.data.read_ahead import parallel_map
from opencoca.generation import GenerationOptions
from opencoca.recaption import Captioner, Destination, caption_to_files, choose_batch_size, open_inputs
from opencoca.system.allocator import keep_freed_memory

PARTS = ("rates", "whole", "kills")
WHOLE, KILLED = Path("whole/c.jsonl"), Path("killed/c.jsonl")
_PER_ROUND = 256


def make_folder(photos: Path, folder: Path, count: int) -> None:
    """`count` JPEG files, the same ones whenever it is called."""
    originals = sorted(photos.rglob("*.jpg"))

    def make(number: int) -> None:
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        if path.exists():
            return
        chance = random.Random(number)
        with Image.open(originals[number % len(originals)]) as original:
            image = original.convert("RGB")
        share = chance.uniform(0.7, 1.0)
        width, height = round(share * image.width), round(share * image.height)
        left, top = chance.randrange(image.width - width + 1), chance.randrange(image.height - height + 1)
        image = image.crop((left, top, left + width, top + height))
        if chance.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = chance.choice((400, 500, 640, 800)) / max(image.size)
        image = image.resize((round(scale * image.width), round(scale * image.height)))
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial := path.with_suffix(".partial"), "JPEG", quality=chance.randrange(80, 96))
        partial.rename(path)

    for _ in parallel_map(make, range(count), os.cpu_count() or 1, 64):
        pass


def decode_rate(captioner: Captioner, paths: Sequence[str], batch_size: int) -> float:
    """Images a second that the decoding threads alone make ready for the model."""
    transform = EvalTransform(captioner.pipeline.preprocess.config)
    start = time.perf_counter()
    for _ in iterate_images(open_inputs(paths), transform, batch_size):
        pass
    return len(paths) / (time.perf_counter() - start)


def model_rate(captioner: Captioner, paths: Sequence[str], batch_size: int) -> float:
    """Images a second that the model alone captions, from pixels in memory."""
    transform = EvalTransform(captioner.pipeline.preprocess.config)
    batches = [batch.pixels for batch in iterate_images(open_inputs(paths), transform, batch_size)]
    start = time.perf_counter()
    for pixels in batches:
        captioner(pixels, [str(index) for index in range(len(pixels))])
    return len(paths) / (time.perf_counter() - start)


def run_rate(captioner: Captioner, inputs: Sequence[str], out: Path, batch_size: int, progress: bool = False) -> float:
    """Images a second of a whole run, from the list of files to the finished output."""
    source = open_inputs(inputs)
    destination = Destination.of(source, out, False)
    start = time.perf_counter()
    caption_to_files(captioner, source, destination, batch_size=batch_size, overwrite=True, progress=progress)
    return len(source) / (time.perf_counter() - start)


def measure_in_turn(captioner: Captioner, paths: list[str], work: Path, size: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds, in each of which the three rates are measured on the same images one after the other."""
    found: list[tuple[float, float, float]] = []
    model_rate(captioner, paths[:size], size)  # warm
    for index in range(rounds):
        chosen = paths[index * _PER_ROUND : (index + 1) * _PER_ROUND]
        rates = (
            decode_rate(captioner, chosen, size),
            model_rate(captioner, chosen, size),
            run_rate(captioner, chosen, work / "round.jsonl", size),
        )
        print("decoding {:.1f}, model {:.1f}, run {:.1f} images a second".format(*rates), flush=True)
        found.append(rates)
    decoding, model, run = (statistics.median(column) for column in zip(*found, strict=True))
    return {
        "decode_images_per_sec": decoding,
        "model_images_per_sec": model,
        "run_images_per_sec": run,
        "run_over_slower_alone": statistics.median(row[2] / min(row[:2]) for row in found),
    }


def run_killed(command: list[str], journal: Path, moments: list[int]) -> int:
    """Starts the command again after each kill; a kill comes when so many images are in the journal. Returns kills."""
    kills = 0
    for moment in moments:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and images_done(journal) < moment:
            time.sleep(random.uniform(0.05, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        print(f"killed at {images_done(journal)} images", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return kills


def images_done(journal: Path) -> int:
    if not journal.exists():
        return 0
    return journal.read_bytes().count(b'{"image":')


def digests(out: Path) -> dict[str, str]:
    names = (out, out.with_name(out.name + ".errors.jsonl"), out.with_name(out.name + ".run.json"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names if path.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, type=Path, help="folder of JPEG photographs")
    parser.add_argument("--work", required=True, type=Path, help="folder for the images and the output")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command does

    torch.set_num_threads(arguments.threads)
    work, folder = arguments.work, arguments.work / "images"
    make_folder(arguments.photos, folder, arguments.count)
    captioner = Captioner(opencoca.load(device="cpu"), GenerationOptions())
    paths = [str(path) for path in sorted(folder.rglob("*.jpg"))]
    size = choose_batch_size(captioner, len(paths))
    result: dict[str, Any] = {"count": len(paths), "batch_size": size}
    if "rates" in arguments.parts:
        result |= measure_in_turn(captioner, paths, work, size, arguments.rounds)
    if "whole" in arguments.parts:
        result["whole_run_images_per_sec"] = run_rate(captioner, [str(folder)], work / WHOLE, size, progress=True)
    if "kills" in arguments.parts:
        result |= compare_killed(work, folder, arguments.kills, arguments.threads, len(paths))
    report(result, arguments.out)


def compare_killed(work: Path, folder: Path, kills: int, threads: int, count: int) -> dict[str, Any]:
    """Does the folder by the command, killed and continued, and compares its files with the whole run's."""
    killed = work / KILLED
    shutil.rmtree(killed.parent, ignore_errors=True)
    moments = sorted(random.Random(0).sample(range(1, count), kills))
    command = [sys.executable, "-m", "opencoca", "caption", str(folder), "--device", "cpu", "--out", str(killed)]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return {
        "kills": run_killed(command, killed.with_name(killed.name + ".journal"), moments),
        "identical_after_kills": digests(work / WHOLE) == digests(killed),
        "sha256": digests(killed),
    }


if __name__ == "__main__":
    main()
