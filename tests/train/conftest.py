"""One thread: the models are tiny, and other work may share the machine."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opencoca.model.config import CoCaConfig
from opencoca.tasks.task import Task
from opencoca.train.flops import ModelFlops
from opencoca.train.recipe.recipe import Recipe

from .helpers import Pairs, write_pairs


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report takes longer than a tiny run; the tests that look at it use a run made by a wider fixture."""
    monkeypatch.setattr("opencoca.train.trainer.write_report", lambda *_: None)


@pytest.fixture(autouse=True, scope="package")
def counted_once() -> Iterator[None]:
    """Counting a tiny model's operations takes as long as some of its steps, so equal models share one count."""
    known: dict[str, ModelFlops] = {}

    def count(config: CoCaConfig, recipe: Recipe, task: Task | None = None) -> ModelFlops:
        # Dropout takes no part, nor do rates, decays and weights of losses.
        layers = re.sub(r"\bdropout=[0-9.]+", "", repr(config))
        key = repr((layers, recipe.encoder, recipe.optimizer.frozen, recipe.task.uses, type(task)))
        if key not in known:
            known[key] = ModelFlops(config, recipe, task)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opencoca.train.flops.ModelFlops", count)
        yield


@pytest.fixture(scope="package")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Ten images with three captions each."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), count=10, captions_per_image=3)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"
