"""Captions in text files beside the images: `photo.txt` or `photo.caption` for `photo.jpg`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from opencoca.system.messages import shown

_SIDECAR_SUFFIXES = (".txt", ".caption")
_MAX_SIDECAR_BYTES = 1 << 20


def read_sidecars(folder: Path, keys: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The captions in the text file beside each image, one on each line, by key; and keys of those without text.

    `photo.txt` goes before `photo.caption`. Raises ValueError for one that isn't text in UTF-8 or is too large.
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
            lines = (line.strip() for line in _read_text(path).splitlines())
            captions[key] = tuple(line for line in lines if line)
            blank += [] if captions[key] else [key]
    return captions, blank


def _read_text(path: Path) -> str:
    name = shown(str(path), 120)
    with open(path, "rb") as file:
        data = file.read(_MAX_SIDECAR_BYTES + 1)
    if len(data) > _MAX_SIDECAR_BYTES:
        raise ValueError(f"cannot read the captions in {name}: it has more than {_MAX_SIDECAR_BYTES:,} bytes")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"cannot read the captions in {name}: it is not UTF-8 text (byte {error.start:,}); save it as UTF-8"
        ) from error
