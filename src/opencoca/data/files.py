"""Small file and thread helpers that the rest of `opencoca.data` shares."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for writing such that it either appears whole or not at all.

    The bytes go to a temporary file in the same folder, which is flushed to disk and renamed when the block ends
    without an exception, and removed otherwise. Raises OSError that names `path` when it can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A failing write (a full disk) doesn't say which file it was about.
        if error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, f"cannot write the file: {error.strerror}", str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
