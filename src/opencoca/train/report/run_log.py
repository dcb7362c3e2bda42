"""A run as its folder tells it, while it goes and after it: metrics, recipe, captions."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opencoca.tasks import TASKS
from opencoca.tasks.task import Score
from opencoca.train.report.metrics_log import read_metrics


@dataclass(frozen=True)
class RunLog:
    """What a run's folder tells. name: of the folder; lines: of metrics.jsonl; recipe: as stored, by dotted key."""

    name: str
    folder: Path
    lines: list[dict[str, Any]]
    recipe: dict[str, Any]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    def points(self, kind: str, name: str, factor: float = 1.0) -> list[tuple[int, float]]:
        """(step, value) of one figure."""
        return [(line["step"], factor * line[name]) for line in self.of(kind) if name in line]

    @property
    def scores(self) -> tuple[Score, ...]:
        """The validation scores of the run's task, as people read them."""
        task = TASKS.get(str(self.recipe.get("task.name", "pretraining")))
        return task[1].scores if task is not None else ()

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)


def read_run(folder: str | Path) -> RunLog:
    """Reads a run's folder. Raises ValueError if it holds no metrics."""
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} is no run: it has no metrics.jsonl; name the folder of an `opencoca train`")
    lines = [line for line in read_metrics(path) if {"kind", "step"} <= line.keys()]
    if not lines:
        raise ValueError(f"{path} has no line yet; the first one comes after log_every_steps steps")
    recipe_path = folder / "recipe.json"
    recipe = json.loads(recipe_path.read_text(encoding="utf-8")) if recipe_path.is_file() else {}
    return RunLog(folder.resolve().name, folder, lines, dict(_flat(recipe)))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found
