"""Finds the files that tables name: under other Unicode forms, through links, and from where a table was written."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from opencoca.system.messages import shown

_MAX_RECORD_BYTES = 1 << 20


class FileFinder:
    """Looks for a file in several folders, the first of them first.

    Where a folder has no file of exactly this name, one counts whose name differs in its Unicode form alone: archives
    from macOS store `é` as `e` and an accent. Backslashes stand between folders if there is no other such file.
    """

    def __init__(self, folders: Iterable[str | Path]):
        self._folders = list(dict.fromkeys(str(folder) for folder in folders))
        self._names_in: dict[str, dict[str, str]] = {}

    def find(self, name: str) -> str | None:
        """Returns the path of the file; None if there is none."""
        for folder in self._folders:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                return path
            if not name.isascii() and (other := self._other_form(folder, name)):
                return other
        return self.find(name.replace("\\", "/")) if "\\" in name else None

    def _other_form(self, folder: str, name: str) -> str | None:
        path = "/" if name.startswith("/") else folder
        for part in filter(None, name.split("/")):
            if os.path.lexists(os.path.join(path, part)):
                path = os.path.join(path, part)
                continue
            stored = self._listing(path).get(unicodedata.normalize("NFC", part))
            if stored is None:
                return None
            path = os.path.join(path, stored)
        return path if os.path.isfile(path) else None

    def _listing(self, folder: str) -> dict[str, str]:
        """The names in a folder, by their composed form."""
        if folder not in self._names_in:
            names: list[str] = []
            with contextlib.suppress(OSError):
                names = os.listdir(folder)
            self._names_in[folder] = {unicodedata.normalize("NFC", name): name for name in names}
        return self._names_in[folder]


class ImageKeys:
    """Turns the names that a table gives to images into keys: paths relative to the folder of images.

    A name may be relative to that folder, to the table's own, or to the one in which `opencoca caption` wrote it, or
    absolute; its file must lie in the folder of images, links followed.

    Attributes:
        missing: keys of images that don't exist.
    """

    def __init__(self, folder: Path, table: Path):
        self.folder = folder
        self.missing: dict[str, None] = {}
        self._finder = FileFinder([folder, *table_folders(table)])
        self._keys: dict[str, str] = {}

    def key(self, written: str, where: str) -> str:
        """Raises ValueError that begins with `where` for an image outside of the folder."""
        key = self._keys.get(written)
        if key is None:
            key = self._keys[written] = self._find(written, where)
        return key

    def _find(self, written: str, where: str) -> str:
        name = posixpath.normpath(written)
        found = self._finder.find(name)
        key = self._relative(found or os.path.join(self.folder, name))
        if key is None:
            folder = shown(str(self.folder), 60)
            raise ValueError(
                f"{where} names the image {shown(written, 70)}, which is outside of the images folder {folder}"
            )
        if found is None:
            self.missing[key] = None
        return key

    def _relative(self, path: str) -> str | None:
        for form in (str, os.path.abspath, os.path.realpath):
            folder, inner = form(str(self.folder)).rstrip("/") + "/", form(path)
            key = inner.removeprefix(folder)
            if key != inner and key not in ("", "..") and not key.startswith("../"):
                return key
        return None


def table_folders(table: Path) -> list[Path]:
    """The folders that a table's names may be relative to: its own, and those that `opencoca caption` recorded."""
    folders = [table.parent]
    record = table.with_name(table.name + ".run.json")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        if record.is_file() and record.stat().st_size <= _MAX_RECORD_BYTES:
            folders += [table.parent / root for root in json.loads(record.read_text(encoding="utf-8"))["roots"]]
    return folders
