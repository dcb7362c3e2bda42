"""Work done ahead in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, window: int
) -> Iterator[Result]:
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
