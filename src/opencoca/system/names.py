"""Names that nobody knows: what they were probably meant to be."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_LONGEST = 80

_Function = TypeVar("_Function", bound=Callable[..., Any])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean NAME?" with the known name that is nearest to a misspelt one, "" if none is near."""
    from difflib import get_close_matches  # not needed where nothing is wrong

    near = get_close_matches(name[:_LONGEST], list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def suggests_options(function: _Function) -> _Function:
    """Makes a function or a class answer an option that it does not have with the name of the nearest one it has.

    The error is a TypeError, as Python's own for an unexpected keyword argument.
    """
    call = function.__init__ if isinstance(function, type) else function
    known = inspect.signature(function).parameters

    @functools.wraps(call)
    def checked(*arguments: Any, **options: Any) -> Any:
        for name in options.keys() - known.keys():
            hint = did_you_mean(name, known) or f"; help({function.__qualname__}) lists its options"
            raise TypeError(f"{function.__name__}() has no option {name[:_LONGEST]!r}{hint}")
        return call(*arguments, **options)

    if isinstance(function, type):
        function.__init__ = checked  # pyright: ignore[reportAttributeAccessIssue]
        return function  # pyright: ignore[reportReturnType]
    return checked  # pyright: ignore[reportReturnType]
