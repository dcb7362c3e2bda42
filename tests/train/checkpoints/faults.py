"""A file layer that fails: the nth operation that changes the disk raises an error, or the process dies there."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from typing import Any

import pytest


class Died(BaseException):
    """The process is gone; nothing that it would have done afterwards happens."""


class Faults:
    """Counts operations; number ``fail_at`` (from 1) raises ``error``, and after `Died` all that follow do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None, error: Any = None):
        self.count, self.fail_at, self.error, self.log = 0, fail_at, error, []
        for module, name in (
            (os, "mkdir"),
            (os, "rename"),
            (os, "replace"),
            (os, "fsync"),
            (os, "unlink"),
            (os, "rmdir"),
        ):
            monkeypatch.setattr(module, name, self._counted(name, getattr(module, name)))
        opened = self._opened(builtins.open)
        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)

    def __call__(self, name: str) -> None:
        self.count += 1
        self.log.append(name)
        if self.fail_at is not None:
            dies = isinstance(self.error, Died)
            if self.count == self.fail_at or (dies and self.count > self.fail_at):
                raise self.error

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self(name)
            return function(*args, **kwargs)

        return call

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def open_counted(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+"):
                return real(file, mode, *args, **kwargs)
            self("open")
            opened = real(file, mode, *args, **kwargs)
            return _CountedFile(opened, self)

        return open_counted


class _CountedFile:
    def __init__(self, file: Any, faults: Faults):
        self._file, self._faults = file, faults

    def write(self, data: Any) -> int:
        half = data[: len(data) // 2]
        try:
            self._faults("write")
        except BaseException:
            self._file.write(half)  # what had arrived until then
            raise
        return self._file.write(data)

    def __enter__(self) -> _CountedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
