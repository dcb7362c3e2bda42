"""The one runner of evaluations: `opencoca evaluate` and the validation of a training run both score with it.

An evaluator takes rows from each batch, on the CPU, and makes scores of all rows. Several processes may share the
batches out and put their rows together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from opencoca.evaluation.encoding import BrokenImage, EncodedImages


class CountMatrix(NamedTuple):
    """How often which label stood beside which.

    title; rows and columns: what their labels are; labels (L,); counts: L rows of L.
    """

    title: str
    rows: str
    columns: str
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """In JSON's types, as a run stores it."""
        return {"kind": "count_matrix", **self._asdict()}

    @staticmethod
    def from_json(content: Any) -> "CountMatrix | None":
        """The inverse of `to_json`; None for another kind of content."""
        if not isinstance(content, dict) or content.get("kind") != "count_matrix":
            return None
        counts = tuple(tuple(row) for row in content["counts"])
        return CountMatrix(content["title"], content["rows"], content["columns"], tuple(content["labels"]), counts)


@dataclass(frozen=True)
class Scores:
    """What an evaluator found.

    values: scores by name, rates from 0 to 1, losses in nats; detail: the evaluator's own report.
    texts: what the model says of each image, by key; kept: more that a training run stores, in JSON's types, by name.
    counts: how many images, labels and so on were compared, and written: more that `opencoca evaluate --out` writes, in
    JSON's types, both by name.
    """

    values: dict[str, float]
    detail: Any = None
    texts: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def joined(parts: "Iterable[Scores]") -> "Scores":
        """The scores of several evaluators in one, without their own reports."""
        whole = Scores({})
        for part in parts:
            for name in ("values", "texts", "kept", "counts", "written"):
                getattr(whole, name).update(getattr(part, name))
        return whole


class Evaluator(Protocol):
    """Scores a model on a source."""

    def rows(self, images: EncodedImages) -> Any:
        """What the scores need of one batch, on the CPU."""
        ...

    def scores(self, rows: Sequence[Any]) -> Scores:
        """The scores of the rows of all batches, in the order of the source."""
        ...


@dataclass(frozen=True)
class Collected:
    """The rows of each evaluator, batch by batch, and the images that were left out."""

    rows: tuple[list[Any], ...]
    broken: list[BrokenImage]

    @property
    def is_empty(self) -> bool:
        return not any(self.rows)


@torch.no_grad()
def collect(batches: Iterable[EncodedImages], evaluators: Sequence[Evaluator]) -> Collected:
    """Runs every evaluator on every batch that has an image."""
    found = Collected(tuple([] for _ in evaluators), [])
    for batch in batches:
        found.broken.extend(batch.broken)
        if not batch.indices:
            continue
        for evaluator, rows in zip(evaluators, found.rows, strict=True):
            rows.append(evaluator.rows(batch))
    return found


def evaluate(
    batches: Iterable[EncodedImages], *evaluators: Evaluator, wanted: str = "images that can be read"
) -> tuple[tuple[Scores, ...], tuple[BrokenImage, ...]]:
    """The scores of each evaluator, and the images that were left out.

    Raises ValueError, with the first broken image's reason, if there is nothing to score.
    """
    found = collect(batches, evaluators)
    if found.is_empty:
        broken = found.broken
        reason = f"; the first of {len(broken)} that cannot: {broken[0].reason}" if broken else ""
        raise ValueError(f"there are no {wanted}{reason}")
    scores = tuple(evaluator.scores(rows) for evaluator, rows in zip(evaluators, found.rows, strict=True))
    return scores, tuple(found.broken)


def numbers(report: Any) -> dict[str, float]:
    """The fields of a report (a dataclass) that are single numbers, by name."""
    return {name: float(value) for name, value in vars(report).items() if isinstance(value, int | float)}
