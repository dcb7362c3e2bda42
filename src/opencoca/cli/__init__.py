"""The command line, `opencoca COMMAND`: each group of commands is a module; this one runs them and reports errors.

Nothing here imports PyTorch: a command does so when it runs, so that help appears at once.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from opencoca.cli import (
    caption,
    common,
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
    streams,
    tokenizer,
    train,
)
from opencoca.cli.parser import CommandError, HelpFormatter, Parser
from opencoca.cli.streams import complain, open_closed_streams, own_lines_alone, silence_stdout
from opencoca.system.messages import brief

_FAULT, _MISTAKE, _INTERRUPTED, _BROKEN_PIPE = 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for a user's mistake, 1 for a fault, 130 when interrupted.

    A command that left out images which it was given ends with 2 as well, but for `train`, which takes others instead.

    Whatever goes wrong is one sentence on stderr, and nothing that libraries print reaches it. With OPENCOCA_DEBUG=1
    both are shown as they are.
    """
    common.stdout_is_closed, streams.lost_images = open_closed_streams(), 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may have bytes that belong to no encoding
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if os.environ.get("OPENCOCA_DEBUG", "0") not in ("", "0"):
        return _run(arguments)
    with own_lines_alone():
        try:
            return _run(arguments)
        except BrokenPipeError:
            # The reader of the output has closed it; Python would report that again when it closes stdout.
            silence_stdout()
            return _BROKEN_PIPE
        except SystemExit:
            raise
        except BaseException as error:  # a library that is written in Rust may raise one that is no Exception
            return _report(error)


def _run(argv: list[str]) -> int:
    if argv[:1] == ["train"]:  # what follows belongs to the recipe
        code = train.run_train(argv[1:])
    else:
        parser = build_parser()
        if "_ARGCOMPLETE" in os.environ:  # the shell asks how a line may go on
            import argcomplete

            argcomplete.autocomplete(parser)
        arguments = parser.parse_args(argv)
        code = arguments.run(arguments) or (_MISTAKE if streams.lost_images else 0)
    sys.stdout.flush()  # so that a full disk or a closed pipe is noticed here
    return code


def _report(error: BaseException) -> int:
    """Says in one sentence what went wrong, and returns the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()
    code, text = _MISTAKE, str(error)
    if isinstance(error, CommandError):
        code = error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        code, text = _INTERRUPTED, "interrupted"
    elif isinstance(error, OSError) and error.errno is not None and type(error).__str__ is OSError.__str__:
        place = "cannot write the output" if error.filename is None else os.fsdecode(error.filename)
        text = f"{place}: {error.strerror or text}"
    elif _is_out_of_memory(error):
        text = f"there is not enough memory ({brief(text, 120) or 'of this machine'}); take fewer images at a time"
    elif not isinstance(error, ValueError | OSError | ImportError):
        code, text = _FAULT, _fault(error)
    complain(text or type(error).__name__)
    return code


def _is_out_of_memory(error: BaseException) -> bool:
    name, text = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text


def _fault(error: BaseException) -> str:
    """Keeps the traceback in a file, and returns a sentence that names it."""
    import tempfile
    import traceback

    what = brief(f"{type(error).__name__}: {error}", 120)
    with tempfile.NamedTemporaryFile("wb", prefix="opencoca-fault-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace"))
    return f"a fault of this program ({what}); please report it with the file {file.name}"


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
