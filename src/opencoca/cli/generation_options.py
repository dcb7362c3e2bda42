"""Command-line options for caption generation, made from the fields of `GenerationOptions`."""

import argparse
import dataclasses
import re
import types
import typing
from typing import Any

from opencoca.cli.parser import Parser
from opencoca.generation.options import GenerationOptions

_METAVARS = {int: "N", float: "X", str: "TEXT"}


_USUAL = ("num_captions", "num_beams", "max_new_tokens", "prefix", "temperature", "seed")


def add_generation_options(parser: Parser, title: str = "generation") -> None:
    """Adds an option for each field, with the field's name, type, default and explanation; and --rerank."""
    usual, rare = parser.add_argument_group(title), parser.add_rare_group(f"more of {title}")
    explained = field_descriptions(GenerationOptions)
    hints = typing.get_type_hints(GenerationOptions)
    for field in dataclasses.fields(GenerationOptions):
        kind = _argument_kind(hints[field.name])
        several = "may be given several times; " if kind.get("action") == "append" else ""
        default = str(field.default).lower() if field.default not in (None, "", ()) else "none"
        (usual if field.name in _USUAL else rare).add_argument(
            "--" + field.name.replace("_", "-"),
            default=list(field.default) if isinstance(field.default, tuple) else field.default,
            help=f"{explained[field.name].replace('%', '%%')} ({several}default: {default})",
            **kind,
        )
    usual.add_argument(
        "--rerank",
        type=_rerank_weight,
        default=False,
        metavar="W",
        help="order all candidates (beams or samples) by the similarity of image and text too; W is the weight of "
        "similarity, 0 to 1, or `default` (default: by log-probability alone)",
    )


def chosen_generation_options(arguments: argparse.Namespace) -> GenerationOptions:
    """Returns the options that were given, without --rerank. Raises ValueError if they do not go together."""
    return GenerationOptions(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(GenerationOptions)})


def _rerank_weight(text: str) -> bool | float:
    try:
        return text == "default" or float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 to 1 nor `default`") from None


def field_descriptions(kind: type) -> dict[str, str]:
    """Reads the description of each field in a dataclass's docstring: `name: text`, up to the next or an empty line."""
    names = "|".join(field.name for field in dataclasses.fields(kind))
    begins = re.compile(rf"(?:^    |; )((?:{names})(?:, (?:{names}))*): ", re.MULTILINE)
    descriptions: dict[str, str] = {}
    for paragraph in (kind.__doc__ or "").split("\n\n"):
        found = list(begins.finditer(paragraph))
        for number, match in enumerate(found):
            end = found[number + 1].start() if number + 1 < len(found) else len(paragraph)
            text = " ".join(paragraph[match.end() : end].split()).rstrip(".;")
            descriptions |= dict.fromkeys(match[1].split(", "), text)
    return descriptions


def _argument_kind(hint: Any) -> dict[str, Any]:
    """Returns how argparse reads a value of this type: int, float, str, X | None, tuple[X, ...], bool | Literal."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    parts = [part for part in parts if part is not type(None)]
    if typing.get_origin(parts[0]) is tuple:
        return {**_argument_kind(typing.get_args(parts[0])[0]), "action": "append"}
    if parts[0] is not bool:
        return {"type": parts[0], "metavar": _METAVARS[parts[0]]}
    literals = [value for part in parts[1:] for value in typing.get_args(part)]
    words = {"false": False, "true": True, **{str(value): value for value in literals}}

    def read(text: str) -> Any:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(words)}")
        return words[text]

    return {"type": read, "metavar": "{" + ",".join(words) + "}"}
