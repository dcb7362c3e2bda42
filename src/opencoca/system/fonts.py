"""Fonts for texts in any script: DejaVu, which comes with matplotlib, or one of this machine that has more of it."""

import functools
import os
from pathlib import Path


def font_file(text: str = "", bold: bool = False) -> str:
    """The file of the font that has the most characters of a text: DejaVu, the same everywhere, if it has them all."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    usual = os.fspath(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)
    wanted = frozenset(map(ord, filter(str.isprintable, text)))
    return usual if wanted <= _characters(usual) else _with_most(wanted, usual)


@functools.lru_cache(maxsize=256)
def _with_most(wanted: frozenset[int], usual: str) -> str:
    best, most = usual, len(wanted & _characters(usual))
    for path in (*_useful, *_installed()):
        found = len(wanted & _characters(path))
        if found > most:
            best, most = path, found
        if most == len(wanted):
            break
    if best != usual and best not in _useful:
        _useful.append(best)
    return best


_useful: list[str] = []
"""Fonts that were chosen before; to look at all the installed ones may take seconds."""


@functools.cache
def _installed() -> tuple[str, ...]:
    from matplotlib.font_manager import findSystemFonts

    return tuple(sorted(findSystemFonts()))


@functools.lru_cache(maxsize=512)
def _characters(path: str) -> frozenset[int]:
    """The code points that a font has; none of one that can't be read or has pictures of one size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
