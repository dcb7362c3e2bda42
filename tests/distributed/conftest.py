"""Processes of their own, once for all tests that look at what they found."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).parents[1]
Results = dict[str, list[dict[str, Tensor]]]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(size: int, arguments: list[str], timeout_s: float = 300) -> None:
    """Runs ``python ARGUMENTS`` as ``size`` processes that know of one another; all must succeed."""
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    common |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")]))),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


@pytest.fixture(scope="session")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, tuple[str, ...]], Results]:
    """Of so many processes and these cases: what each process found, by case; computed once."""
    known: dict[tuple[int, tuple[str, ...]], Results] = {}

    def results(size: int, names: tuple[str, ...]) -> Results:
        if (size, names) not in known:
            folder = tmp_path_factory.mktemp("ranks")
            run_ranks(size, ["-m", "distributed.cases", str(folder), *names])
            known[size, names] = {
                name: [torch.load(folder / f"{name} {rank}.pt", weights_only=True) for rank in range(size)]
                for name in names
            }
        return known[size, names]

    return results
