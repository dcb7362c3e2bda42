"""The interface of a task: what a run trains and how it is scored.

The training engine, validation, `opencoca plan` and the reports know a task through this module alone. One file in
tasks/ is one task; the table of them is in tasks/__init__.py.

Letters: S samples of a batch, R rows of embeddings, E embed_dim.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from opencoca.data import Batch, SampleSource, Target
from opencoca.distributed.world import World
from opencoca.evaluation.runner import Evaluator
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.tokenizer import Tokenizer


class Term(NamedTuple):
    """One term of the loss; its value is logged as ``NAME_loss``.

    weight: its factor in the total.
    per: which of the task's `counts` its sum is divided by, over the whole batch and all processes; None: it is a sum.
    across_batch: it compares embeddings of the whole batch, and comes from `Task.compare`; the others add up over
        samples, and come from `Task.losses`.
    """

    name: str
    weight: float
    per: str | None = None
    across_batch: bool = False


class Compared(NamedTuple):
    """What the terms that compare embeddings across the batch are computed from.

    rows: embeddings (R, E), of one kind each; a sample has the same number of rows of a kind as the others.
    sample_ids: (S,) of the samples that the rows are of, in order.
    shared: scalars that are the same for every part of the batch, such as the temperature.
    """

    rows: tuple[Tensor, ...]
    sample_ids: Tensor
    shared: tuple[Tensor, ...]


class Outputs(NamedTuple):
    """What the network gives for a batch.

    compared: for the terms across the batch, None if there are none; own: for the other terms, in the task's own order.
    """

    compared: Compared | None
    own: tuple[Tensor, ...]


class Score(NamedTuple):
    """How people read one validation score: its name in the log, a label, a factor, the digits behind the point.

    chart: the title of the chart of the report that shows it; None: it is in the table alone.
    headline: it is shown after every validation.
    """

    name: str
    label: str
    factor: float = 100.0
    digits: int = 1
    chart: str | None = None
    headline: bool = False


class Uses(NamedTuple):
    """Which halves of the network a task needs; linear_alone: of the contrastive one the linear branch and no more."""

    contrastive: bool = False
    captioning: bool = False
    linear_alone: bool = False


class Task(Protocol):
    """What a run trains and how it is scored.

    name: as recipes call it; uses: which halves of the network it needs, beside the image encoder.
    terms: the terms of the loss.
    scores: the validation scores that people read.
    reads_texts: whether its batches hold texts.
    encode_target: makes a sample's target a row of `Batch.targets`, in worker processes; None: there are no targets.
    """

    name: str
    uses: Uses
    terms: tuple[Term, ...]
    scores: tuple[Score, ...]
    reads_texts: bool
    encode_target: Callable[[Target | None], np.ndarray] | None

    def configure(self, config: CoCaConfig) -> CoCaConfig:
        """The architecture with the layers that this task adds."""
        ...

    def prepare(self, network: CoCa, tokenizer: Tokenizer, begins: bool = True) -> str | None:
        """Makes the task ready to train this network, whose frozen parts are frozen by now; returns a line for the log.

        begins: the weights are those of the beginning; otherwise those of a checkpoint will follow.
        """
        ...

    def stored(self) -> dict[str, Any] | None:
        """What a model folder keeps of the task, in JSON's types; None if nothing is needed to use the model.

        `name` is the task's; `classes`, if it is there, names the outputs of the head, which `Pipeline.classify` ranks.
        """
        ...

    @classmethod
    def from_stored(cls, content: Mapping[str, Any]) -> "Task":
        """The inverse of `stored`: a task whose evaluators score the trained model. Only for tasks that store."""
        ...

    def unreached(self, network: CoCa) -> Sequence[nn.Parameter]:
        """The parameters that no term has a gradient for."""
        ...

    def counts(self, batch: Batch) -> dict[str, int]:
        """What terms are averaged over, for one process's batch, by name; known before the forward pass."""
        ...

    def forward(self, network: CoCa, batch: Batch, compared_only: bool = False) -> Outputs:
        """Runs the network; compared_only: only what the terms across the batch need."""
        ...

    def compare(self, compared: Compared, world: World) -> dict[str, Tensor]:
        """The terms across the batch, by name: this process's part of each; all processes call."""
        ...

    def losses(self, network: CoCa, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The other terms, by name: sums over the batch's samples."""
        ...

    def validated(self) -> "Task":
        """The task whose losses validation reports: this one without what is for training alone."""
        ...

    def after_update(self, network: CoCa) -> None:
        """What follows every update of the weights, such as a limit of the temperature."""
        ...

    def monitors(self, network: CoCa) -> dict[str, float]:
        """Numbers of the network that the log follows, by name."""
        ...

    def evaluators(self, source: SampleSource, tokenizer: Tokenizer) -> tuple[Evaluator, ...]:
        """What scores the validation samples, beside the losses: the code that `opencoca evaluate` runs.

        Raises ValueError if the source lacks what they need.
        """
        ...

    def selection(self, scores: dict[str, float]) -> float:
        """The score by which the best weights are chosen; more is better."""
        ...


class Losses(NamedTuple):
    """total: the weighted sum of the terms; terms: each by name, without its weight. Scalars."""

    total: Tensor
    terms: dict[str, Tensor]


def batch_losses(task: Task, network: CoCa, batch: Batch) -> Losses:
    """The losses of one batch in one process, by one forward pass."""
    outputs, counts = task.forward(network, batch), task.counts(batch)
    divisors = {term.name: max(1, counts[term.per]) if term.per else 1 for term in task.terms}
    values = {name: value / divisors[name] for name, value in task.losses(network, outputs, batch).items()}
    if outputs.compared is not None:
        values |= task.compare(outputs.compared, World())
    terms = {term.name: values[term.name] for term in task.terms}
    return Losses(torch.stack([term.weight * terms[term.name] for term in task.terms]).sum(), terms)
