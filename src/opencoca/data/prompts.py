"""Prompts: texts with one `{}`, where the name of a class goes."""

from __future__ import annotations

from collections.abc import Sequence


def check_templates(templates: Sequence[str]) -> None:
    """Raises ValueError for no templates, one bare text, or a template in which `{}` doesn't stand once."""
    if isinstance(templates, str):
        raise ValueError(f"the prompt templates are the single text {templates!r}; give a list of them")
    if not templates:
        raise ValueError("there are no prompt templates; give at least one, such as 'a photo of a {}.'")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"the prompt template {template!r} must contain {{}} once, where the name of the class goes"
            )


def fill_template(template: str, name: str) -> str:
    """The template with a name in place of `{}`; other braces stay as they are."""
    return template.replace("{}", name)


def fill_templates(name: str, templates: Sequence[str]) -> list[str]:
    """A name in every template, in their order. Raises ValueError for a blank name, and as `check_templates` does."""
    check_templates(templates)
    if not name.strip():
        raise ValueError(f"the label {name!r} is empty; give every label a name")
    return [fill_template(template, name) for template in templates]
