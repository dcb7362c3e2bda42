"""Files on web servers and in object stores: http(s)://, s3://, gs:// and whatever else fsspec knows.

The one module that touches fsspec. A read that fails, hangs or comes back short is tried again, after growing pauses.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")

# What trying again does not change.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class RemoteReadError(OSError):
    """A remote file could not be read after several attempts. Its samples may be good, so a run stops here."""


@dataclass(frozen=True)
class RetryPolicy:
    """The number of attempts of a remote read, and the pauses between them.

    Args:
        attempts: tries before giving up.
        first_pause_s: after the first failure; doubled after each further one.
        longest_pause_s: no pause is longer.
        timeout_s: how long one try may take.
    """

    attempts: int = 8
    first_pause_s: float = 0.2
    longest_pause_s: float = 20.0
    timeout_s: float = 60.0

    def pause_s(self, failures: int) -> float:
        """The time to wait after so many failures: up to half less at random, lest many readers return at once."""
        longest = min(self.longest_pause_s, self.first_pause_s * 2 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


DEFAULT_RETRIES = RetryPolicy()


@dataclass(frozen=True)
class RemoteStatus:
    """Size in bytes, and the store's tag of the contents ("" where it has none)."""

    size: int
    etag: str


def is_remote(path: object) -> bool:
    """Tells whether a path is a URL."""
    return "://" in str(path)


def read_range(url: str, offset: int, size: int, retries: RetryPolicy = DEFAULT_RETRIES) -> bytes:
    """`size` bytes from `offset` on, in one request. Raises RemoteReadError, also where the file is shorter."""

    def fetch() -> bytes:
        data = _call(url, "cat_file", retries.timeout_s, start=offset, end=offset + size)
        if len(data) != size:
            raise OSError(f"{len(data):,} bytes came instead of {size:,}")
        return data

    return _retried(fetch, url, f"bytes {offset:,} to {offset + size:,}", retries)


def read_file(url: str, retries: RetryPolicy = DEFAULT_RETRIES) -> bytes:
    """A whole (small) file. Raises FileNotFoundError, RemoteReadError."""
    return _retried(lambda: _call(url, "cat_file", retries.timeout_s), url, "it", retries, missing=True)


def write_file(url: str, data: bytes, retries: RetryPolicy = DEFAULT_RETRIES) -> None:
    """Store a file; object stores show it once it is whole. Raises RemoteReadError if it can't be written."""
    _retried(lambda: _call(url, "pipe_file", retries.timeout_s, data), url, "it", retries)


def remote_status(url: str, retries: RetryPolicy = DEFAULT_RETRIES) -> RemoteStatus:
    """Size and tag of a file. Raises FileNotFoundError, RemoteReadError."""

    def ask() -> RemoteStatus:
        info = _call(url, "info", retries.timeout_s)
        if info.get("size") is None:
            raise OSError("its server does not tell its size")
        tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or ""
        return RemoteStatus(int(info["size"]), str(tag).strip('"'))

    return _retried(ask, url, "the size of it", retries, missing=True)


def find_remote(pattern: str, retries: RetryPolicy = DEFAULT_RETRIES) -> list[str]:
    """URLs that match a glob, sorted. Web servers list nothing: there only names without wildcards work."""
    scheme = pattern.partition("://")[0]

    def ask() -> list[str]:
        filesystem = _filesystem(pattern)
        return sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(pattern))

    found = _retried(ask, pattern, "the list of", retries)
    return [name if is_remote(name) else f"{scheme}://{name}" for name in found]


def _retried(
    action: Callable[[], Result], url: str, what: str, retries: RetryPolicy, *, missing: bool = False
) -> Result:
    failures = 0
    while True:
        try:
            return action()
        except FileNotFoundError as error:
            if missing:
                raise FileNotFoundError(f"there is no file {url!r}") from error
            raise RemoteReadError(f"cannot read {url!r}: there is no such file (any more)") from error
        except _FINAL as error:
            raise RemoteReadError(f"cannot read {url!r}: {_reason(error)}; check the access rights") from error
        except ImportError as error:
            scheme = url.partition("://")[0]
            raise ImportError(
                f"reading {scheme}:// needs a package that is not installed ({error}); install the extra: "
                "pip install 'opencoca[remote]'"
            ) from error
        except Exception as error:  # each store has exceptions of its own
            failures += 1
            if failures >= retries.attempts:
                raise RemoteReadError(
                    f"cannot read {what} of {url!r} after {failures} attempts ({_reason(error)}); check the connection "
                    "and start again: a run continues where it stopped"
                ) from error
            time.sleep(retries.pause_s(failures))


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# By process and scheme: a file system's connections must not be shared with a forked worker.
_filesystems: dict[tuple[int, str], Any] = {}


def _filesystem(url: str) -> Any:
    import fsspec

    scheme = url.partition("://")[0]
    place = (os.getpid(), scheme)
    if place not in _filesystems:
        try:
            # Sizes are asked for to find out what changed: an answer from memory would be of no use.
            _filesystems[place] = fsspec.filesystem(scheme, use_listings_cache=False)
        except ValueError as error:
            raise ImportError(str(error)) from error
    return _filesystems[place]


def _call(url: str, function: str, timeout_s: float, *args: Any, **options: Any) -> Any:
    """Runs an operation of the file system, with a time limit where its kind allows one."""
    filesystem = _filesystem(url)
    if not getattr(filesystem, "async_impl", False):
        return getattr(filesystem, function)(url, *args, **options)
    from fsspec.asyn import sync

    async def limited() -> Any:
        path = filesystem._strip_protocol(url)
        return await asyncio.wait_for(getattr(filesystem, f"_{function}")(path, *args, **options), timeout_s)

    return sync(filesystem.loop, limited)
