"""Metrics of a run as JSON lines, the truth from which pictures and TensorBoard are made."""

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends one JSON object a line to ``path``; lines of steps after ``resume_step`` are dropped at the start."""

    def __init__(self, path: Path, resume_step: int, tensorboard: bool = False):
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.writer = _tensorboard_writer(path.parent) if tensorboard else None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """kind: train or validation."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(f"{kind}/{name}", value, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; a last line that a crash cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _tensorboard_writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: true needs the package: pip install 'opencoca[tensorboard]'") from error
    return SummaryWriter(folder / "tensorboard")
