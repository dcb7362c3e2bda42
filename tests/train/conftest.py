"""One thread: the models are tiny, and other work may share the machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="package")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Ten images with three captions each."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), count=10, captions_per_image=3)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"
