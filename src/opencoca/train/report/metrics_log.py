"""Metrics of a run as JSON lines, the truth from which reports and TensorBoard are made.

Every line has kind and step. kind train: means over the steps since the line before; validation: scores; captions: of
fixed validation photographs, by key; event: what went wrong.
"""

import json
from pathlib import Path
from typing import Any

from opencoca.system.files import WriteError, atomic_write
from opencoca.train.step import StepMetrics

# What the engine itself writes into a line of training; other numbers, but for the losses, are the task's monitors.
ENGINE_FIGURES = frozenset(
    {"step", "epoch", "loss", "grad_norm", "lr", "images_per_sec", "tokens_per_sec", "step_ms", "data_wait_ms"}
    | {"model_flops_per_sec", "model_flops_utilisation", "memory_bytes"}
)


def followed(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of training that its task follows beside the losses."""
    own = {name: value for name, value in line.items() if isinstance(value, int | float) and name not in ENGINE_FIGURES}
    return {name: value for name, value in own.items() if not name.endswith("_loss")}


class MetricsLog:
    """Appends one JSON object a line to ``path``; lines of steps after ``resume_step`` are dropped at the start."""

    def __init__(self, path: Path, resume_step: int, tensorboard: bool = False, patient: bool = False):
        """patient: lines that cannot be written wait for the next one, or for `close`, instead of being an error."""
        self.path, self.patient, self._waiting = path, patient, ""
        self.writer = _tensorboard_writer(path.parent, resume_step) if tensorboard else None
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        with atomic_write(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """kind: train, validation, captions or event. Raises WriteError (an OSError) if the disk is full."""
        self._waiting += json.dumps({"kind": kind, "step": step, **values}) + "\n"
        self._write_waiting(self.patient)
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(f"{kind}/{name}", value, step)
                elif isinstance(value, dict):
                    for key, text in value.items():
                        self.writer.add_text(f"{kind}/{key}", str(text), step)

    def close(self) -> None:
        self._write_waiting(patient=False)
        if self.writer is not None:
            self.writer.close()

    def _write_waiting(self, patient: bool) -> None:
        if not self._waiting:
            return
        try:
            _append(self.path, self._waiting)
        except OSError as error:
            if not patient:
                self._waiting = ""  # said once
                message = (
                    f"cannot write {self.path} ({error.strerror}): free some space, and the same command continues"
                )
                raise WriteError(error.errno, message) from error
        else:
            self._waiting = ""


def _append(path: Path, text: str) -> None:
    """Adds all of a text to a file, or nothing. Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        data = memoryview(text.encode())
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; a last line that a crash cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class MetricsWindow:
    """What happened since the last line of the log; its state goes into checkpoints, so that no step is left out."""

    def __init__(self, state: dict[str, Any] | None = None):
        self._state: dict[str, Any] = {"rows": [], "latest": {}, "images": 0, "tokens": 0}
        self._state |= {"waited": 0.0, "seconds": 0.0, "flops": 0.0}
        self._state |= state or {}

    def add(self, metrics: StepMetrics, waited: float, seconds: float, flops: float = 0.0) -> None:
        """Adds a step. waited: the part of its seconds before its batch came; flops: what it needed here."""
        terms = {f"{name}_loss": value for name, value in metrics.terms.items()}
        self._state["rows"].append({"loss": metrics.loss, **terms, "grad_norm": metrics.grad_norm})
        self._state["latest"] = {"lr": metrics.lr}
        counts = {"images": metrics.samples, "tokens": metrics.tokens}
        counts |= {"waited": waited, "seconds": seconds, "flops": flops}
        for name, value in counts.items():
            self._state[name] += value

    @property
    def flops_per_sec(self) -> float:
        """The rate of operations since the last flush."""
        return self._state["flops"] / max(self._state["seconds"], 1e-9)

    @property
    def is_empty(self) -> bool:
        return not self._state["rows"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the window, in JSON's types."""
        return self._state

    def flush(self) -> dict[str, float]:
        """Returns means over the steps since the last flush, and empties the window."""
        rows, seconds = self._state["rows"], max(self._state["seconds"], 1e-9)
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[-1]}
        means |= self._state["latest"]
        means |= {f"{name}_per_sec": self._state[name] / seconds for name in ("images", "tokens")}
        means |= {"step_ms": 1e3 * seconds / len(rows), "data_wait_ms": 1e3 * self._state["waited"] / len(rows)}
        self._state = MetricsWindow()._state
        return means


def _tensorboard_writer(folder: Path, resume_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: true needs the package: pip install 'opencoca[tensorboard]'") from error
    return SummaryWriter(folder / "tensorboard", purge_step=resume_step + 1)
