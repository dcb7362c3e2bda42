"""Loading coca_ViT-L-14 (638M parameters, 2.55 GB): seconds and memory, OpenCoCa against open_clip.

    python benchmarks/loading.py --work DIR [--runs 3] [--out FILE]

DIR (10 GB) holds the weights: random ones in open_clip's files, made once by open_clip, and converted into a model
folder. Every measurement is a process of its own; importing is not part of it; all files are in the system's cache.
Extra memory is the peak of resident memory while loading less that before it, memory-mapped pages of the file
included. open_clip (the package open_clip_torch) must be installed, --peers PATH adds its site-packages.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import import_open_clip, report

NAME = "coca_ViT-L-14"
WAYS = {
    "OpenCoCa, model folder": "folder",
    "OpenCoCa, open_clip's .bin": "open_clip_pytorch_model.bin",
    "open_clip, .bin": "open_clip_pytorch_model.bin",
    "open_clip, .safetensors": "open_clip_model.safetensors",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peers", help="site-packages that have open_clip")
    parser.add_argument("--out")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peers:
        sys.path.append(arguments.peers)
    if arguments.measure == "prepare":
        prepare(arguments.work)
    elif arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.work)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    command = [sys.executable, __file__, "--work", str(arguments.work)]
    command += ["--peers", arguments.peers] if arguments.peers else []
    if not (arguments.work / "folder" / "model.safetensors").is_file():
        subprocess.run([*command, "--measure", "prepare"], check=True)
    results: dict[str, Any] = {}
    for way, file in WAYS.items():
        path = arguments.work / file
        size = (path / "model.safetensors" if path.is_dir() else path).stat().st_size
        runs = []
        for _ in range(arguments.runs + 1):  # the first brings the file into the system's cache
            output = subprocess.check_output([*command, "--measure", way], text=True)
            runs.append(json.loads(output.splitlines()[-1]))
        results[way] = {
            "file_gb": size / 1e9,
            "seconds": statistics.median(run["seconds"] for run in runs[1:]),
            "all_seconds": [run["seconds"] for run in runs[1:]],
            "processor_seconds": statistics.median(run["processor_seconds"] for run in runs[1:]),
            "extra_gb": max(run["extra_bytes"] for run in runs[1:]) / 1e9,
            "extra_of_file": max(run["extra_bytes"] for run in runs[1:]) / size,
        }
    report({"model": NAME, "ways": results}, arguments.out)


def prepare(work: Path) -> None:
    """Random weights of open_clip's, in its two kinds of file, and converted."""
    import torch
    from safetensors.torch import save_file

    from opencoca.store.interop.open_clip import load_open_clip
    from opencoca.store.model_folder import save_model_folder

    open_clip = import_open_clip()
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = open_clip.create_model(NAME)
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.02)  # which open_clip leaves as it finds it
    torch.save(model.state_dict(), work / "open_clip_pytorch_model.bin")
    save_file(model.state_dict(), work / "open_clip_model.safetensors")
    del model
    gc.collect()
    converted = load_open_clip(NAME, work / "open_clip_pytorch_model.bin")
    save_model_folder(work / "folder", converted.model, converted.tokenizer, converted.preprocess)


def measure(way: str, work: Path) -> dict[str, float]:
    import torch

    path = work / WAYS[way]
    if way.startswith("OpenCoCa"):
        from opencoca.inference.loading import load

        if path.is_dir():
            run = lambda: load(path, "cpu")  # noqa: E731
        else:
            run = lambda: load(f"open_clip:{NAME}", "cpu", checkpoint=path)  # noqa: E731
    else:
        open_clip = import_open_clip()
        run = lambda: open_clip.create_model_and_transforms(NAME, pretrained=str(path))  # noqa: E731
    torch.zeros(8) @ torch.zeros(8)  # what PyTorch sets up when first used
    gc.collect()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is now resident
    start, processor_start = time.perf_counter(), time.process_time()
    loaded = run()
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    assert loaded is not None
    return {"seconds": seconds, "processor_seconds": processor_seconds, "extra_bytes": _memory("VmHWM") - before}


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


if __name__ == "__main__":
    main()
