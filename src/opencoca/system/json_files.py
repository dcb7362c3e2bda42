"""Reads JSON files of unknown origin, which may be long, deep or say a thing twice, and quotes what stands in them."""

import json
import os
from pathlib import Path
from typing import Any

from opencoca.system.messages import brief, shown

_MAX_DEPTH, _MAX_VALUES = 64, 4_000_000


def read_json(file: Path, max_bytes: int) -> Any:
    """Returns the content of a JSON file.

    Raises ValueError that names the file if it is larger than max_bytes, no JSON, nested too deeply, or gives a name
    twice.
    """
    return parse_json(read_bounded(file, max_bytes), file)


def read_bounded(file: Path, max_bytes: int) -> str:
    """Returns the text of a file. Raises ValueError if it is larger than max_bytes or not UTF-8."""
    with open(file, "rb") as stream:
        content = stream.read(max_bytes + 1)
        size = max(len(content), os.fstat(stream.fileno()).st_size)
    if size > max_bytes:
        raise ValueError(f"{file} is damaged or no model's: it has {size:,} bytes, more than {max_bytes:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({error.reason} at byte {error.start})") from error


def parse_json(text: str, file: Path) -> Any:
    """Returns what a JSON text says; raises ValueError, with the name of its file, as `read_json` does."""
    try:
        # Counted before anything is built of them: short ones take twenty times the memory of their text.
        if sum(map(text.count, ",[{")) > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES:,} values")
        content = json.loads(text, object_pairs_hook=_without_repeats)
        _check_depth(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({brief(error)})") from error
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"it gives {shown(repeated, 60)} twice")
    return found


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(_MAX_DEPTH):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
