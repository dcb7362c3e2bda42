"""The first captions: `opencoca caption` against the same call in Python, as whole processes.

    python benchmarks/first_caption.py --photos DIR [--count 8] [--rounds 5] [--before CHECKOUT] [--out FILE]

Both start, load the model, caption the same photographs and end, in turn, so that other work on the machine meets them
alike. With --batch-size the command is also run with a given size: what choosing one costs is the difference. With
--before the command of another checkout of the project takes part as well.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import report

_CALL = "import sys, opencoca\nfor text in opencoca.load(device='cpu').caption(sys.argv[1:]): print(text)"


def seconds_of(command: list[str], source: Path | None) -> tuple[float, list[str]]:
    """How long a command runs, and the last field of each line that it prints: the captions.

    source: where the package is, if it is not the installed one.
    """
    environment = os.environ if source is None else os.environ | {"PYTHONPATH": str(source)}
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - start, [line.rpartition("\t")[2] for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, type=Path, help="folder of JPEG photographs")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="also the command with this batch size")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="also the command of this checkout")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    photos = [str(path) for path in sorted(arguments.photos.glob("*.jpg"))[: arguments.count]]
    command = [sys.executable, "-m", "opencoca", "caption", *photos, "--device", "cpu"]
    ways = {"python_s": [sys.executable, "-c", _CALL, *photos], "command_s": command}
    if arguments.batch_size:
        ways["command_with_batch_size_s"] = [*command, "--batch-size", str(arguments.batch_size)]
    if arguments.before:
        ways["command_before_s"] = command
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        captions = []
        for name, way in ways.items():
            source = arguments.before / "src" if name == "command_before_s" else None
            seconds, texts = seconds_of(way, source)
            found[name].append(seconds)
            captions.append(texts)
        assert all(texts == captions[0] for texts in captions), "the captions differ"
        print({name: round(seconds[-1], 2) for name, seconds in found.items()}, flush=True)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    ratios = {
        f"command_over_{name.removesuffix('_s')}": statistics.median(
            a / b for a, b in zip(found["command_s"], found[name], strict=True)
        )
        for name in ways
        if name != "command_s"
    }
    report({"photos": len(photos), **medians, **ratios}, arguments.out)


if __name__ == "__main__":
    main()
