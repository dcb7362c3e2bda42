"""The one way to read ahead: work done in threads while the caller is busy with what is done already."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, window: int
) -> Generator[Result, None, None]:
    """`map(function, items)` in a thread pool: results in order, at most `window` items under way or waiting.

    The bound keeps memory flat when the consumer is slower than the threads. Closing the iterator early cancels what
    hasn't begun. `num_threads` 0 computes in the caller's thread.
    """
    if num_threads < 0:
        raise ValueError(f"num_workers must be 0 or more, got {num_threads}")
    if num_threads == 0:
        yield from map(function, items)
        return
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="opencoca-data")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) >= max(window, num_threads):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def batches_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], batch_size: int, num_threads: int
) -> Generator[list[Result], None, None]:
    """`map(function, items)` in lists of `batch_size` (the last may be shorter), two lists ahead of the caller."""
    with contextlib.closing(parallel_map(function, items, num_threads, 2 * batch_size)) as results:
        while batch := list(itertools.islice(results, batch_size)):
            yield batch


def one_ahead(items: Generator[Item, None, None], count: int) -> Generator[Item, None, None]:
    """The `count` items of a generator, of which a thread makes the next while the caller works on the present one."""
    try:
        yield from parallel_map(lambda _: next(items), range(count), num_threads=1, window=2)
    finally:
        items.close()
