"""Processes of their own, once for all tests that look at what they found."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from processes import run_ranks

from .cases import take_cases

Results = dict[str, list[dict[str, Tensor]]]


@pytest.fixture(scope="session")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, tuple[str, ...]], Results]:
    """Of so many processes and these cases: what each process found, by case; computed once."""
    known: dict[tuple[int, tuple[str, ...]], Results] = {}

    def results(size: int, names: tuple[str, ...]) -> Results:
        if (size, names) not in known:
            folder = tmp_path_factory.mktemp("ranks")
            run_ranks(size, take_cases, folder, names, folder=folder)
            known[size, names] = {
                name: [torch.load(folder / f"{name} {rank}.pt", weights_only=True) for rank in range(size)]
                for name in names
            }
        return known[size, names]

    return results
