"""Text that somebody else chose, as messages and lists show it."""

import pytest

from opencoca.system.messages import brief, escaped, shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("two\nlines", "two\\nlines"),
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("caf\udce9", "caf\\udce9"),
        ("two  spaces ", "two  spaces "),
        ("café 猫", "café 猫"),
    ],
)
def test_a_name_changes_only_where_a_terminal_would_act(name: str, expected: str) -> None:
    assert escaped(name) == expected


def test_a_message_is_one_line_and_keeps_its_ends() -> None:
    assert brief("two\nlines \x1b[31m") == "two lines \\x1b[31m"
    line = brief(f"begin {'x' * 5000} end", 300)
    assert len(line) == 300
    assert line.startswith("begin x")
    assert line.endswith("x end")


def test_a_value_stands_in_quotes_within_its_length() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("y" * 5000, 60)) == 60
    assert len(shown(list(range(5000)), 60)) <= 60
