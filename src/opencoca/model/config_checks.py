"""What the configurations of a model ask of their values; every failure is a `ValueError` that names the value."""

import math
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from opencoca.system.messages import brief, shown

MAX_IMAGE_SIDE = 8192
# Far beyond the largest CoCa of the paper, of 2 billion parameters; what is not listed is at most _MAX_COUNT.
_MAX_COUNT = 65_536
_MAX_COUNTS = {
    **dict.fromkeys(("depth", "unimodal_depth", "multimodal_depth"), 512),
    **dict.fromkeys(("patch_size", "num_heads", "num_kv_heads", "head_dim"), 4096),
    **dict.fromkeys(("mlp_width", "text_multimodal_mlp_width"), 1 << 20),
    **dict.fromkeys(("vocab_size", "text_hidden_id", "num_outputs"), 1 << 24),
}


def as_pair(value: Any, name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(_is_whole(side) and 0 < side <= MAX_IMAGE_SIDE for side in pair):
        found = shown(value, 60)
        raise ValueError(
            f"{name} {found} must be (height, width) in pixels, both positive and at most {MAX_IMAGE_SIDE}"
        )
    return pair


def check_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if divisor < 1 or value % divisor:
        raise ValueError(f"{divisor_name} {divisor} must divide the {name} {value}")


def check_fields(where: str, config: Any) -> None:
    """Checks that every field of a dataclass has a value of its type, one of its choices, and no absurd number."""
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        found = shown(value, 60)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{where} {name} {found} is none of {', '.join(get_args(hint))}")
        if not _is_of_type(value, hint):
            raise ValueError(f"{where} {name} {found} must be {_described(hint)}")
        if int in (hint, *get_args(hint)) and _is_whole(value) and value > (most := _MAX_COUNTS.get(name, _MAX_COUNT)):
            raise ValueError(f"{where} {name} {found} must be at most {most:,}")


_hints = cache(get_type_hints)
_NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", type(None): "nothing"}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_of_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of_type(value, part) for part in get_args(hint))
    if hint is int:
        return _is_whole(value)
    if hint is float:
        return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, hint) if get_origin(hint) is None and isinstance(hint, type) else True


def _described(hint: Any) -> str:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return " or ".join(_NAMES.get(part, getattr(part, "__name__", str(part))) for part in parts)


def check_counts(where: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not (_is_whole(value) and value >= 1):
            raise ValueError(f"{where} {name} {shown(value, 60)} must be a whole number of at least 1")


def check_dropout(where: str, dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"{where} dropout {dropout} must be at least 0 and less than 1")


def config_from_dict(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping of fields, got {shown(values, 60)}")
    hints = _hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(f"{where} has unknown fields {brief(', '.join(unknown), 60)}; known: {', '.join(hints)}")
    arguments = dict(values)
    for name, value in values.items():
        for part in (hints[name], *get_args(hints[name])):
            if is_dataclass(part) and isinstance(part, type) and value is not None:
                arguments[name] = config_from_dict(part, value, f"{where}.{name}")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{where} has a value of the wrong type: {error}") from error
