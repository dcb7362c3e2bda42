"""A checkout of this project as seen from outside: its command line, and `opencoca.load` in a process of its own.

    python benchmarks/checkouts.py FUNCTION '[ARGUMENTS]'

prints what a function of `ANSWERS` returns for the opencoca that Python finds.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Checkout(NamedTuple):
    """A folder with this project at some commit."""

    folder: Path

    def run(self, *command: str) -> float:
        """Seconds that `opencoca COMMAND` takes as a process."""
        start = time.perf_counter()
        self._python("-m", "opencoca", *command)
        return time.perf_counter() - start

    def ask(self, function: str, *arguments: Any) -> Any:
        """What the function of this name returns in a process that imports this checkout's opencoca."""
        return json.loads(self._python(__file__, function, json.dumps(arguments, default=str)).splitlines()[-1])

    def commit(self) -> str:
        changed = " with changes" if self._git("status", "--porcelain") else ""
        return self._git("rev-parse", "--short", "HEAD").strip() + changed

    def check(self) -> None:
        """Raises SystemExit if another opencoca than this checkout's would be imported."""
        found = self.ask("imported_from")
        if not Path(found).is_relative_to(self.folder):
            raise SystemExit(f"the opencoca that is imported for {self.folder} is in {found}")

    def _git(self, *words: str) -> str:
        command = ["git", "-C", str(self.folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def _python(self, *words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(self.folder / "src")}
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.folder}: {' '.join(words)} ended with {done.returncode}\n{done.stderr[-2000:]}")
        return done.stdout


def imported_from() -> str:
    import opencoca

    return str(opencoca.__file__)


def model_config(model: str) -> dict[str, Any]:
    """The configuration of a model's network, as recipes of this checkout spell it."""
    import opencoca

    return asdict(opencoca.load(model, device="cpu").model.config)


def save_tokenizer(file: str) -> None:
    """Writes the vocabulary of the shipped model."""
    import opencoca

    opencoca.load(device="cpu").tokenizer.save(file)


def caption_seconds(model: str, beams: int, tokens: int, repeats: int) -> list[float]:
    """How long captions of this many tokens take for 8 images, after a first time."""
    import opencoca

    pipeline = opencoca.load(model, device="cpu")
    images = list(np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        pipeline.caption(images, num_beams=beams, max_new_tokens=tokens, min_new_tokens=tokens)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


ANSWERS = {function.__name__: function for function in (imported_from, model_config, save_tokenizer, caption_seconds)}


if __name__ == "__main__":
    print(json.dumps(ANSWERS[sys.argv[1]](*json.loads(sys.argv[2]))))
