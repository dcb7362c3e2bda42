"""What became of an input that was tried: refused by a sentence or used, at what cost, and what was wrong with that."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MAX_SENTENCE = 300


class Trial(NamedTuple):
    """One input: what it is, the sentence of the refusal ("" if it is used), and what was wrong ("" for nothing).

    peak_bytes: the most memory that the process had beyond what it had before.
    """

    name: str
    refusal: str
    fault: str
    seconds: float
    peak_bytes: int


def attempt(name: str, use: Callable[[], object], max_seconds: float, max_bytes: float) -> Trial:
    """Uses an input once. A ValueError or OSError with one short sentence is a refusal."""
    refusal = fault = ""
    before = _reset_peak()
    with tempfile.TemporaryFile() as printed:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(printed.fileno(), 2)
        started = time.process_time()
        with warnings.catch_warnings(record=True) as warned:
            try:
                use()
            except (ValueError, OSError) as error:
                refusal = str(error)
            except BaseException as error:  # what is tried may raise anything
                fault = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - started
        os.dup2(stderr, 2)
        os.close(stderr)
        printed.seek(0)
        text = printed.read().decode(errors="replace") + "".join(str(warning.message) for warning in warned)
    peak = max(0, _peak() - before)
    faults = {
        fault: bool(fault),
        f"it printed {text[:200]!r}": bool(text),
        f"no short sentence: {refusal[:400]!r}": len(refusal) > MAX_SENTENCE or not refusal.isprintable(),
        f"it took {seconds:.1f} s": seconds > max_seconds,
        f"it took {peak / 1e6:,.0f} MB": peak > max_bytes,
    }
    return Trial(name, refusal, "; ".join(text for text, holds in faults.items() if holds), seconds, peak)


def describe(kind: str, trials: list[Trial]) -> str:
    """A row of figures, and each trial that went wrong."""
    slowest, largest = max(trials, key=lambda trial: trial.seconds), max(trials, key=lambda trial: trial.peak_bytes)
    wrong = [trial for trial in trials if trial.fault]
    row = (
        f"{kind}: {len(trials):,} tried, {sum(not trial.refusal for trial in trials) - len(wrong):,} used, "
        f"{sum(bool(trial.refusal) for trial in trials):,} refused, {len(wrong):,} wrong, "
        f"slowest {slowest.seconds:.2f} s ({slowest.name}), most memory {largest.peak_bytes / 1e6:,.0f} MB "
        f"({largest.name})"
    )
    return "\n".join([row, *(f"  {trial.name}: {trial.fault}" for trial in wrong)])


def _reset_peak() -> int:
    """Makes the present memory the peak, where the system can do that, and returns it."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
