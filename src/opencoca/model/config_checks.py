"""What the configurations of a model ask of their values; every failure is a `ValueError` that names the value."""

from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


def as_pair(value: Any, name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"{name} {value!r} must be (height, width) in pixels, both positive")
    return pair


def check_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if divisor < 1 or value % divisor:
        raise ValueError(f"{divisor_name} {divisor} must divide the {name} {value}")


def check_choices(where: str, config: Any) -> None:
    """Checks the fields that have a few possible values, those of their `Literal`."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{where} {name} {value!r} is none of {', '.join(get_args(hint))}")


def check_counts(where: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{where} {name} {value!r} must be a whole number of at least 1")


def check_dropout(where: str, dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"{where} dropout {dropout} must be at least 0 and less than 1")


def config_from_dict(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping of fields, got {values!r}")
    hints = get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(f"{where} has unknown fields {', '.join(unknown)}; known: {', '.join(hints)}")
    arguments = dict(values)
    for name, value in values.items():
        for part in (hints[name], *get_args(hints[name])):
            if is_dataclass(part) and isinstance(part, type) and value is not None:
                arguments[name] = config_from_dict(part, value, f"{where}.{name}")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{where} has a value of the wrong type: {error}") from error
