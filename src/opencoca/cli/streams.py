"""The streams of a command: its own lines reach the user, and what libraries print beside them does not."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from opencoca.system.messages import brief
from opencoca.system.notice import LeftOut, Notice

_LONGEST = 300
lost_images = 0
"""How often the present command has said that images are left out."""


def open_closed_streams() -> bool:
    """Opens the standard streams that are closed, so that no file gets their numbers; whether stdout was one of them.

    What is written to them is lost.
    """
    was_closed = sys.stdout is None
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)  # the lowest free number, which is this one
        setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (as long as the process)
    return was_closed


@contextlib.contextmanager
def own_lines_alone() -> Iterator[None]:
    """While the block runs, nothing but what this package prints reaches stderr.

    Libraries' warnings and records of the log are left out, and so is what C libraries write to the file descriptor
    itself. Warnings of this package become sentences.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), _descriptor_silenced():
            warnings.simplefilter("default", Notice)
            warnings.showwarning = _show
            yield
    finally:
        logging.disable(disabled)


def complain(sentence: str) -> None:
    """Prints a sentence on stderr, above a progress bar if there is one."""
    line = f"opencoca: {brief(sentence, _LONGEST)}"
    if "tqdm" not in sys.modules:  # there is no bar, and importing it takes longer than some commands
        print(line, file=sys.stderr)
        return
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def complain_of_left_out(sentence: str) -> None:
    """Prints a sentence about an image that is left out; the exit code of the command becomes 2."""
    global lost_images
    lost_images += 1
    complain(sentence)


def silence_stdout() -> None:
    """Drops what is still to be written to a stdout that cannot take it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, Notice):
        (complain_of_left_out if issubclass(category, LeftOut) else complain)(str(message))


@contextlib.contextmanager
def _descriptor_silenced() -> Iterator[None]:
    """Sends what is written to file descriptor 2 nowhere, but for what Python writes to sys.stderr."""
    before = sys.stderr
    before.flush()
    kept = os.dup(2)
    if _writes_to_descriptor_2():
        sys.stderr = open(  # noqa: SIM115 (closed below)
            kept, "w", buffering=1, encoding=before.encoding, errors="backslashreplace", closefd=False
        )
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        sys.stderr = before
        os.dup2(kept, 2)
        os.close(kept)


def _writes_to_descriptor_2() -> bool:
    try:
        return sys.stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):  # a test's
        return False
