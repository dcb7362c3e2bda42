"""Counts through how many functions, in how many files, one greedy word and one training step of a checkout pass.

    python scripts/count_walks.py [CHECKOUT ...] [--list] [--json FILE]

Two commands are run that differ in nothing but how much they do: `opencoca caption` with more and fewer words, and
`opencoca train` with more and fewer steps. A function belongs to the walk of a word (or step) if the longer command
calls it at least once more for each word (or step) that it has more. What is done once, or at the end, is not called
more often, so that this script need not know where in the code a word or a step begins.

word: of a greedy caption of one image by the shipped model, on the CPU.
step: a batch's gradient and the update, by the shipped recipe with stored features (and a narrow model), on the CPU, in
    the main thread of the process that trains: what runs within the innermost function that calls both backward and
    the optimizer.
round: all that happens from one step to the next: its data and what is noted of it too. No metrics are written, and
    nothing is validated or saved.

What counts: functions and methods with a name that are written in src/opencoca, properties, nested functions and
generators too (each time they go on). Lambdas, comprehensions and generator expressions are part of the function they
are written in. What Python or a decorator generates (a dataclass's __init__), class bodies and modules do not count.
"""

import argparse
import inspect
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

FEWER, MORE = 3, 8
"""Words of a caption, and steps of a run, of the two commands."""

IMAGES, BATCH_SIZE = 40, 4  # an epoch is longer than a run
COLOURS = ("red", "green", "blue", "white")
SMALL = {
    "embed_dim": 64,
    "image.image_size": "[64, 64]",
    "pooler.num_heads": 2,
    "text.width": 64,
    "text.num_heads": 2,
    "text.mlp_width": 128,
}
"""The trained model is narrower than the shipped one: it passes the same functions, and takes seconds."""

Function = tuple[str, str]
"""A function: its file, relative to src/opencoca, and its qualified name."""


class Recording(NamedTuple):
    """How often a command calls each function: everywhere, and within steps (from its second step on)."""

    everywhere: Counter[Function]
    in_steps: Counter[Function]
    printed: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("checkouts", nargs="*", type=Path, default=[here], help="folders (default: this one)")
    parser.add_argument("--list", action="store_true", help="also print the functions by file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write counts and functions")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for checkout in arguments.checkouts:
        found[str(checkout)] = results = {}
        for name, walk in walks_of(checkout.resolve()).items():
            files = by_file(walk)
            results[name] = {"functions": len(walk), "files": len(files), "by_file": files}
            print(f"{checkout}: {name}: {len(walk)} functions in {len(files)} files", flush=True)
            if arguments.list:
                print("\n".join(f"    {file}: {', '.join(names)}" for file, names in files.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def by_file(walk: set[Function]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = defaultdict(list)
    for file, name in sorted(walk):
        files[file].append(name)
    return dict(files)


def walks_of(checkout: Path) -> dict[str, set[Function]]:
    """The functions of a word, a step and a round."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_data(work)
        fewer, more = (record_caption(checkout, work, words) for words in (FEWER, MORE))
        if len(more.printed.split()) < len(fewer.printed.split()) + 2:
            raise SystemExit(f"the caption ends before {MORE} words: {more.printed!r}")
        less, longer = (record_training(checkout, work, steps) for steps in (FEWER, MORE))
    return {
        "word": called_more(fewer.everywhere, more.everywhere),
        "step": called_more(less.in_steps, longer.in_steps),
        "round": called_more(less.everywhere, longer.everywhere),
    }


def called_more(fewer: Counter[Function], more: Counter[Function]) -> set[Function]:
    """What the longer command calls at least once more for each word or step that it has more."""
    walk = {function for function, calls in more.items() if calls - fewer[function] >= MORE - FEWER}
    assert walk, "the longer command calls no function more often"
    return walk


def make_data(work: Path) -> None:
    """A folder of small coloured images, and the table of their captions."""
    folder = work / "images"
    folder.mkdir()
    lines = ["image,caption"]
    for number in range(IMAGES):
        colour, side = COLOURS[number % len(COLOURS)], 64 + number
        Image.new("RGB", (side, side), colour).save(folder / f"{number}.png")
        lines += [f"{number}.png,a {colour} square of {side} and {times} pixels" for times in range(5)]
    (work / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def record_caption(checkout: Path, work: Path, words: int) -> Recording:
    image = str(work / "images/0.png")
    return record(checkout, ["caption", image, "--device", "cpu", "--max-new-tokens", str(words)])


def record_training(checkout: Path, work: Path, steps: int) -> Recording:
    options: dict[str, Any] = {
        "data.train_images": work / "images",
        "data.train_captions": work / "captions.csv",
        "output": work / f"run_{steps}",
        "encoder.init": "none",
        "encoder.cache_views": 1,
        "batch_size": BATCH_SIZE,
        "max_steps": steps,
        "log_every_steps": 1000,
        "device": "cpu",
        **{f"model.{key}": value for key, value in SMALL.items()},
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    recording = record(checkout, ["train", str(checkout / "recipes/flickr8k.yaml"), *words])
    if not recording.in_steps:
        raise SystemExit(f"{checkout}: no function was seen that calls both backward and the optimizer")
    return recording


def record(checkout: Path, command: list[str]) -> Recording:
    """Runs `opencoca COMMAND` of the checkout in a process of its own, under a `Recorder`."""
    package = checkout / "src/opencoca"
    environment = os.environ | {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calls.json"
        done = subprocess.run(
            [sys.executable, __file__, "--record", str(package), str(file), *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{checkout}: opencoca {' '.join(command)} failed\n{done.stderr[-2000:]}")
        tables = json.loads(file.read_text(encoding="utf-8"))
    everywhere, in_steps = (Counter({(path, name): calls for path, name, calls in table}) for table in tables)
    return Recording(everywhere, in_steps, done.stdout)


# --- the process that is recorded ---


class Recorder:
    """Counts the calls of a package's functions in the main thread while a command runs."""

    def __init__(self, package: Path):
        self.package = package
        self.everywhere: Counter[CodeType] = Counter()
        self.in_steps: Counter[CodeType] = Counter()
        self.step: CodeType | None = None  # the innermost function that calls both backward and the optimizer
        self._open_steps = 0
        self._backward: list[FrameType] = []

    def run(self, command: list[str]) -> None:
        """`opencoca COMMAND`, from its start to its end."""
        register_optimizer_step_post_hook(self._see_update)
        sys.argv = ["opencoca", *command]
        sys.setprofile(self._see)
        try:
            runpy.run_module("opencoca", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        finally:
            sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call":
            self._open_steps += code is self.step
            self.everywhere[code] += 1
            if self._open_steps:
                self.in_steps[code] += 1
            elif self.step is None and code is torch.autograd.backward.__code__:
                self._backward = self._stack(frame)
        elif event == "return":
            self._open_steps -= code is self.step and self._open_steps > 0

    def _see_update(self, *_: object) -> None:
        if self.step is None and self._backward:
            shared = [one for one in self._stack(sys._getframe()) if any(one is other for other in self._backward)]
            self.step = shared[0].f_code
            self._backward = []

    def _stack(self, frame: FrameType | None) -> list[FrameType]:
        """The calls of the package's functions that have not returned, the innermost first."""
        frames = []
        while frame is not None:
            if self._is_ours(frame.f_code):
                frames.append(frame)
            frame = frame.f_back
        return frames

    def _is_ours(self, code: CodeType) -> bool:
        is_named = bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")
        return is_named and Path(code.co_filename).is_relative_to(self.package)

    def table(self, calls: Counter[CodeType]) -> list[tuple[str, str, int]]:
        """File, name and number of calls of each function of the package."""
        totals: Counter[Function] = Counter()
        for code, number in calls.items():
            if self._is_ours(code):
                totals[str(Path(code.co_filename).relative_to(self.package)), code.co_qualname] += number
        return [(*function, number) for function, number in totals.items()]


def record_here(package: str, file: str, *command: str) -> None:
    recorder = Recorder(Path(package))
    recorder.run(list(command))
    tables = [recorder.table(calls) for calls in (recorder.everywhere, recorder.in_steps)]
    Path(file).write_text(json.dumps(tables), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record_here(*sys.argv[2:])
    else:
        main()
