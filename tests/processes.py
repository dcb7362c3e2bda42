"""Processes that tests start, copied from one that has imported this package already, so that each begins at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
# The last is what the first step of any optimizer imports.
_CONTEXT.set_forkserver_preload(["opencoca.train.trainer", "torch._dynamo"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    work: Callable[..., object], *arguments: object, output: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Starts ``work(*arguments)`` in a process and a process group of its own; all that it prints goes to ``output``.

    work: a function of a module; with its arguments it must be picklable. environment: changes to this process's.
    """
    variables = {**os.environ, **(environment or {})}
    method = multiprocessing.get_start_method()
    process = _CONTEXT.Process(target=_begin, args=(work, arguments, output, variables, method))
    process.start()
    return process


def _begin(
    work: Callable[..., object], arguments: Sequence[object], output: Path, environment: Mapping[str, str], method: str
) -> None:
    os.setsid()
    # Or its own processes, as a loader's, would come from a further server, which imports all once more.
    multiprocessing.set_start_method(method, force=True)
    os.environ.clear()
    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    work(*arguments)


def start_ranks(
    size: int, work: Callable[..., object], *arguments: object, folder: Path, last: Sequence[object] = ()
) -> list[BaseProcess]:
    """Starts ``size`` processes that know of one another; what rank R prints goes to ``folder/rank-R.txt``.

    last: further arguments of the last process alone.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [
        start(
            work,
            *arguments,
            *(last if rank == size - 1 else ()),
            output=folder / f"rank-{rank}.txt",
            environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]


def kill(process: BaseProcess) -> None:
    """Ends a process and those that it has started, if it is still there."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or has no group of its own yet
        process.kill()


def finish(processes: list[BaseProcess], folder: Path, timeout_s: float = 240) -> tuple[list[int | None], list[str]]:
    """Waits for the processes of `start_ranks`; returns their exit codes, and what they printed."""
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.exitcode is None:
                kill(process)
    return codes, [(folder / f"rank-{rank}.txt").read_text(encoding="utf-8") for rank in range(len(processes))]


def run_ranks(size: int, work: Callable[..., object], *arguments: object, folder: Path, timeout_s: float = 240) -> None:
    """Runs ``work(*arguments)`` as ``size`` processes that know of one another; all must succeed."""
    codes, outputs = finish(start_ranks(size, work, *arguments, folder=folder), folder, timeout_s)
    assert codes == [0] * size, "\n".join(outputs)
