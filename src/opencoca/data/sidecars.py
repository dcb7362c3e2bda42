"""Captions in text files beside the images: `photo.txt` or `photo.caption` for `photo.jpg`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from opencoca.system.reading import read_lines

_SIDECAR_SUFFIXES = (".txt", ".caption")
_MAX_SIDECAR_BYTES = 1 << 20


def read_sidecars(folder: Path, keys: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The captions in the text file beside each image, one on each line, by key; and keys of those without text.

    `photo.txt` goes before `photo.caption`. Raises ValueError for one that isn't UTF-8 text, OSError for one too large.
    """
    captions: dict[str, tuple[str, ...]] = {}
    blank: list[str] = []
    names_in: dict[str, set[str]] = {}
    for key in keys:
        parent, name = os.path.split(key)
        if parent not in names_in:
            names_in[parent] = {name for name in os.listdir(folder / parent) if name.endswith(_SIDECAR_SUFFIXES)}
        stem = os.path.splitext(name)[0]
        beside = next((stem + suffix for suffix in _SIDECAR_SUFFIXES if stem + suffix in names_in[parent]), None)
        if beside is not None and (path := folder / parent / beside).is_file():
            captions[key] = tuple(read_lines(path, "captions", _MAX_SIDECAR_BYTES))
            blank += [] if captions[key] else [key]
    return captions, blank
