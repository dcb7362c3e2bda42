"""The command line, `opencoca COMMAND`: each group of commands is a module; this one runs them and reports errors.

Nothing here imports PyTorch: a command does so when it runs, so that help appears at once.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from opencoca.cli import (
    caption,
    convert,
    data,
    evaluate,
    explain,
    export,
    images,
    models,
    plan,
    push,
    quantize,
    report,
    tokenizer,
    train,
)
from opencoca.cli.common import CommandError, HelpFormatter, Parser

_BROKEN_PIPE, _INTERRUPTED, _MISTAKE = 141, 130, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for a user's mistake, 130 when interrupted.

    A mistake is one sentence on stderr; OPENCOCA_DEBUG=1 shows where it was raised. Other exceptions are bugs of this
    program and are not caught.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may have bytes that belong to no encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        # The reader of the output has closed it; Python would report that again when it closes stdout.
        _silence_stdout()
        return _BROKEN_PIPE
    except (CommandError, ValueError, OSError, KeyboardInterrupt) as error:
        if os.environ.get("OPENCOCA_DEBUG", "0") not in ("", "0"):
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _silence_stdout()
        print(f"opencoca: {_sentence(error)}", file=sys.stderr)
        if isinstance(error, CommandError):
            return error.exit_code
        return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _MISTAKE


def _run(argv: list[str]) -> int:
    if argv[:1] == ["train"]:  # what follows belongs to the recipe
        code = train.run_train(argv[1:])
    else:
        arguments = build_parser().parse_args(argv)
        code = arguments.run(arguments)
    sys.stdout.flush()  # so that a full disk or a closed pipe is noticed here
    return code


def build_parser() -> Parser:
    """Builds the parser of all commands; `run` of the parsed arguments is the chosen command's function."""
    parser = Parser(
        prog="opencoca",
        description="Caption, classify, embed and find photographs with a CoCa model, and train one.",
        epilog="example:\n  opencoca caption photo.jpg\n\n`opencoca COMMAND --help` explains each command.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for group in (
        caption,
        images,
        explain,
        evaluate,
        train,
        report,
        plan,
        data,
        tokenizer,
        models,
        push,
        convert,
        export,
        quantize,
    ):
        group.add_commands(commands)
    return parser


class _Version(argparse.Action):
    """Reads the version only when asked for it, because that is slow."""

    def __call__(self, *_: object) -> NoReturn:
        import opencoca

        print(f"opencoca {opencoca.__version__}")
        raise SystemExit(0)


def _sentence(error: BaseException) -> str:
    """Returns the error as one line; for errors of the operating system the file comes first."""
    text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    if isinstance(error, OSError) and error.errno is not None and type(error).__str__ is OSError.__str__:
        place = "cannot write the output" if error.filename is None else os.fsdecode(error.filename)
        text = f"{place}: {error.strerror or text}"
    return " ".join(text.split()) or type(error).__name__


def _silence_stdout() -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
