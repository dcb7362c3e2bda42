"""Misspelt names and options: the nearest one is named, and nothing else about a call changes."""

import inspect
from dataclasses import dataclass

import pytest

from opencoca.system.names import did_you_mean, suggests_options


def test_the_nearest_name_is_named() -> None:
    assert did_you_mean("num_beam", ["num_beams", "num_groups"]) == "; did you mean num_beams?"
    assert did_you_mean("colour", ["num_beams", "num_groups"]) == ""
    assert did_you_mean("x" * 1_000_000, ["num_beams"]) == ""


def test_a_function_keeps_its_signature_and_names_the_nearest_option() -> None:
    @suggests_options
    def pour(cup: str, *, amount: int = 1) -> tuple[str, int]:
        """Pours."""
        return cup, amount

    assert pour("blue", amount=2) == ("blue", 2)
    assert list(inspect.signature(pour).parameters) == ["cup", "amount"]
    assert pour.__doc__ == "Pours."
    with pytest.raises(TypeError, match=r"^pour\(\) has no option 'amuont'; did you mean amount\?$"):
        pour("blue", amuont=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"^pour\(\) has no option 'sugar'; help\(.*pour\) lists its options$"):
        pour("blue", sugar=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'cup'"):
        pour()  # pyright: ignore[reportCallIssue]


def test_a_class_does_the_same() -> None:
    @suggests_options
    @dataclass(frozen=True)
    class Cup:
        colour: str = "blue"

    assert Cup(colour="red").colour == "red"
    assert list(inspect.signature(Cup).parameters) == ["colour"]
    with pytest.raises(TypeError, match=r"^Cup\(\) has no option 'color'; did you mean colour\?$"):
        Cup(color="red")  # pyright: ignore[reportCallIssue]
