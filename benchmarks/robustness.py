"""Inputs that came to harm, or that somebody made to do harm, tried by the thousand: each is used or refused.

    python benchmarks/robustness.py                   # everything
    python benchmarks/robustness.py images --count 400 --seed 3

What is wrong with an input: an error that is no refusal, a refusal that is no short sentence, a process that dies, more
time or memory than stated, anything printed. The exit code is 1 if there is one such.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import hostile_images
import hostile_models
import hostile_recipes
import hostile_tables
import hostile_tars
from trials import Trial, describe


class Kind(NamedTuple):
    """A kind of input: the function that tries some of a seed (the first number and how many), and how many in all."""

    attempt: Callable[[int, int, int], list[Trial]]
    count: int


KINDS = {
    "images": Kind(hostile_images.attempt, 4000),
    "tables": Kind(hostile_tables.attempt, 200),
    "models": Kind(hostile_models.attempt, 200),
    "tars": Kind(hostile_tars.attempt, 200),
    "recipes": Kind(hostile_recipes.attempt, 150),
}
_TOGETHER = 100


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"some of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--count", type=int, help="inputs of each kind (default: its own number)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    wrong = 0
    for name in arguments.kinds or KINDS:
        kind = KINDS[name]
        found = run(kind.attempt, arguments.count or kind.count, arguments.seed)
        print(describe(name, found), flush=True)
        wrong += sum(bool(trial.fault) for trial in found)
    return 1 if wrong else 0


def run(attempt: Callable[[int, int, int], list[Trial]], count: int, seed: int) -> list[Trial]:
    """Tries `count` inputs, some in each process; of a process that dies all are wrong."""
    found: list[Trial] = []
    for first in range(0, count, _TOGETHER):
        number = min(_TOGETHER, count - first)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=lambda first=first, number=number, sender=sender: sender.send(attempt(seed, first, number))
        )
        process.start()
        sender.close()
        try:
            found += receiver.recv()
        except EOFError:
            process.join()
            died = f"the process died with {process.exitcode}"
            found += [Trial(f"{first} to {first + number - 1}", "", died, 0.0, 0)] * number
        process.join()
    return found


if __name__ == "__main__":
    sys.exit(main())
