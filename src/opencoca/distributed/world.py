"""The processes that train one model together, and how they exchange numbers and results.

`torchrun` starts them and `join_world` connects them; without it there is one process, and everything here does
nothing. The number of rows of a tensor may differ from process to process, and may be 0.
Letters: R ranks, S rows of one rank, N rows of all.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opencoca.distributed.elastic import is_store_reused, store_of_this_attempt

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Result = TypeVar("Result")
# While one process works alone (on a vocabulary, a feature cache, validation), the others wait as long as it takes.
_PATIENCE = timedelta(days=7)
_MISTAKE = 2
_PARTING_S = 5.0
_CPU = torch.device("cpu")
_ALREADY_KNOWN = "_known_to_all_ranks"


class _Report(NamedTuple):
    """What a process tells the others about its work: the result, or that it failed."""

    result: Any
    failed: bool


@dataclass(frozen=True)
class World:
    """This process's place among ``size`` processes; ``World()`` is one process alone.

    rank: number of this process among all, from 0; local_rank: its number on this machine, from 0.
    device: where tensors must be to be exchanged fast.
    host_group: the group for exchanges that may take long; it has no timeout.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = _CPU
    host_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, validates and writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Tells for each flag whether it is set in any process."""
        counts = self.sum(torch.tensor(flags, dtype=torch.int64, device=self.device))
        return tuple(count > 0 for count in counts.tolist())

    def gather_counts(self, *counts: int) -> list[tuple[int, ...]]:
        """Collects the numbers of all processes, in the order of their ranks."""
        if self.size == 1:
            return [counts]
        own = torch.tensor([counts], dtype=torch.int64, device=self.device)
        return [tuple(numbers) for numbers in self.gather_rows(own, [1] * self.size).tolist()]

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Joins the rows (S, ...) of all processes, rank by rank: (N, ...), without gradient; counts: each rank's S."""
        rows = rows.detach()
        if self.size == 1:
            return rows
        assert len(rows) == counts[self.rank]
        most = max(counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(self.size * most, *rows.shape[1:])
        parts = list(gathered.chunk(self.size))
        dist.all_gather(parts, padded)
        if min(counts) == most:
            return gathered
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def wait(self) -> None:
        """Waits until all processes have come here, however long it takes."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Rank 0 does the work while the others wait; all return its result, which must be picklable.

        If it fails, rank 0 raises the error, and the others exit silently.
        """
        return self._meet(lambda: work() if self.is_main else None)[0]

    def together(self, work: Callable[[], Result]) -> Result:
        """Every process does the work and returns its own result, once all have succeeded.

        If any fails, the first that failed raises its error, and the others exit silently. The work may call
        `on_main` and `gather_results`, and nothing else that waits for other processes.
        """
        own: list[Result] = []
        self._meet(lambda: own.append(work()))
        return own[0]

    def gather_results(self, result: Result) -> list[Result]:
        """Collects the results of all processes, by rank; they must be picklable. Allowed in the work of `together`."""
        return self._meet(lambda: result)

    def with_own_group(self) -> "World":
        """Returns the same processes for use by a thread, whose exchanges do not mix with those of this object.

        The thread may use `on_main`, `together` and `gather_results`. All processes must call this.
        """
        if self.size == 1:
            return self
        return replace(self, host_group=dist.new_group(backend="gloo", timeout=_PATIENCE))

    def _meet(self, work: Callable[[], Any]) -> list[Any]:
        """Does the work, waits for the others and returns the results of all.

        A process that failed comes here too, so that the others learn of it.
        """
        if self.size == 1:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            if getattr(raised, _ALREADY_KNOWN, False):  # the others have learned of it in a meeting inside this one
                raise
            error = raised
        reports: list[Any] = [None] * self.size
        dist.all_gather_object(reports, _Report(result, error is not None), group=self.host_group)
        failed = [rank for rank, report in enumerate(reports) if report.failed]
        if error is not None and failed[0] == self.rank:
            setattr(error, _ALREADY_KNOWN, True)
            raise error
        if failed:
            raise SystemExit(_MISTAKE)
        return [report.result for report in reports]


def is_main_process() -> bool:
    """Whether this process is the one that prints; it may not be connected to the others yet."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join_world(timeout_minutes: float = 10.0) -> Iterator[World]:
    """Connects to the other processes that `torchrun` started, and disconnects at the end.

    timeout_minutes: how long a process waits for another one in the middle of a step before it gives up.
    """
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"}:
        yield World()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device, backend = _CPU, "gloo"
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    if is_store_reused():
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = store_of_this_attempt(rank, size, timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, timeout=timeout)
    host_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, device, host_group)
    except BaseException:
        _part_after_failure()
        raise
    dist.destroy_process_group()


def _part_after_failure() -> None:
    """Disconnects from the others if that needs no waiting.

    Exiting while a group exists sometimes aborts the process. But when one process alone fails, disconnecting may wait
    for others that wait for it; torchrun then ends them.
    """
    parting = Thread(target=dist.destroy_process_group, daemon=True)
    parting.start()
    parting.join(_PARTING_S)


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether each process holds a part of the tensor."""
    # Importing this module of torch takes a second, and no tensor is sharded where nobody has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Returns this process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor from all processes, which must all call; returns any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(full: Tensor, like: Tensor) -> Tensor:
    """Shards ``full``, which every process holds, as ``like`` is sharded, on its device."""
    full = full.to(like.device)
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
