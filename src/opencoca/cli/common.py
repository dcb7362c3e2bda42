"""Shared by all commands: the parser, common options, lists of images, output as tables and JSON files."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from opencoca.data import SampleSource
    from opencoca.inference.pipeline import Pipeline

Run = Callable[[argparse.Namespace], int]


class CommandError(Exception):
    """Ends the command with this sentence on stderr and this exit code."""

    def __init__(self, sentence: str, exit_code: int = 2):
        super().__init__(sentence)
        self.exit_code = exit_code


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Ends an option's help with its default, unless the help speaks of that itself or the option is a switch."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = bool(action.default) and action.default not in (True, argparse.SUPPRESS)
        return text + " (default: %(default)s)" if has_default and "default:" not in text else text


class Parser(argparse.ArgumentParser):
    """Reports mistakes in the arguments as one sentence, and takes no abbreviated options."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; `{self.prog} --help` explains the command")


def add_command(commands: Any, name: str, run: Run, purpose: str, *, example: str, more: str = "") -> Parser:
    """Adds a command whose help says what it is for and shows an example."""
    epilog = f"example:\n  {example}" + (f"\n\n{more}" if more else "")
    parser = commands.add_parser(name, help=purpose, description=purpose, epilog=epilog, formatter_class=HelpFormatter)
    parser.set_defaults(run=run)
    return parser


def add_group(commands: Any, name: str, purpose: str) -> Any:
    """Adds a command that has sub-commands, and returns the object that those are added to."""
    parser = commands.add_parser(name, help=purpose, description=purpose)
    return parser.add_subparsers(title="commands", metavar="COMMAND", dest=f"{name}_command", required=True)


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --device and --dtype, which `load_pipeline` reads."""
    parser.add_argument(
        "--model",
        metavar="M",
        help="name of a model (`opencoca models` lists them), folder of a model or of a training run, or "
        "hf-hub:ORGANISATION/NAME (default: the model that comes with the package)",
    )
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto (CUDA if there is a GPU), cpu, cuda, cuda:N or mps"
    )
    parser.add_argument(
        "--dtype", metavar="T", help="floating-point type: float32, bfloat16 or float16 (default: float32)"
    )


def add_model_options(parser: argparse.ArgumentParser, batch_size: int | None = 32) -> None:
    """Adds the options of `add_load_options` and --batch-size; its default None means as many as fit into memory."""
    add_load_options(parser)
    text = "images at a time" if batch_size else "images at a time (default: as many as fit into --memory)"
    parser.add_argument("--batch-size", type=positive_int, default=batch_size, metavar="N", help=text)


def add_model_and_folder(parser: argparse.ArgumentParser, out_dir: str = "folder to write") -> None:
    """Adds the arguments MODEL and OUT_DIR."""
    parser.add_argument("model", metavar="MODEL", help="name of a model, or a model's or training run's folder")
    parser.add_argument("out_dir", metavar="OUT_DIR", help=out_dir)


def add_captioned_images(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds --images, --captions, the tables' columns and --limit, which `open_captioned` reads."""
    parser.add_argument("--images", required=required, metavar="DIR", help="folder of images, tar shards, or a table")
    parser.add_argument(
        "--captions",
        metavar="CSV",
        help="table (CSV, TSV, JSONL, JSON or Parquet) with the columns image and caption; several captions of an "
        "image are several rows or a list; tar shards and tables of images contain their own captions",
    )
    add_columns(parser, "image", "caption")
    add_limit(parser)


def add_columns(parser: argparse.ArgumentParser, *columns: str) -> None:
    """Adds --image-column, --caption-column and --label-column, or some of them."""
    also = {"image": "images, file_name, filepath", "caption": "captions, text, title", "label": "labels"}
    for column in columns:
        parser.add_argument(
            f"--{column}-column",
            default=column,
            metavar="NAME",
            help=f"the tables' column with the {column} (default: {column}, or {also[column]})",
        )


def add_limit(parser: argparse.ArgumentParser) -> None:
    """Adds --limit, which `some_images` takes."""
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N images")


def add_by(parser: argparse.ArgumentParser) -> None:
    """Adds --by: what compares texts with images."""
    parser.add_argument(
        "--by",
        choices=("similarity", "likelihood", "both"),
        default="similarity",
        help="compare embeddings (similarity), or how much more probable the image makes a text for the captioner "
        "(likelihood), or add both",
    )


def add_templates(parser: argparse.ArgumentParser, default: str | None, meaning: str) -> None:
    """Adds --templates; meaning: what its default is."""
    parser.add_argument(
        "--templates",
        default=default,
        metavar="T",
        help="sentences around a label: clip (80 of them), simple (one), or a text file with one on each line and {} "
        f"for the label (default: {meaning})",
    )


def open_captioned(arguments: argparse.Namespace) -> "SampleSource":
    """The images and captions that --images, --captions and --limit name."""
    from opencoca.data import ImageFolder, open_source

    columns = {"image_column": arguments.image_column, "caption_column": arguments.caption_column}
    source = open_source(arguments.images, arguments.captions, **columns)
    if isinstance(source, ImageFolder) and not any(source.captions(index) for index in range(len(source))):
        raise CommandError(f"{arguments.images!r} is a folder of images without captions; add --captions CSV")
    return some_images(source, arguments.limit)


def some_images(source: "SampleSource", limit: int | None) -> "SampleSource":
    """The first images of a source, at most `limit`."""
    from opencoca.data import Subset

    return source if limit is None else Subset(source, range(min(limit, len(source))))


def load_pipeline(arguments: argparse.Namespace) -> "Pipeline":
    """Loads the model that --model, --device and --dtype name; freed memory is kept for the next batch."""
    from opencoca.inference.loading import load
    from opencoca.system.allocator import keep_freed_memory

    keep_freed_memory()
    return load(arguments.model, arguments.device, arguments.dtype)


def positive_int(text: str) -> int:
    """Reads an argument that is a whole number of at least 1."""
    return _int(text, 1)


def non_negative_int(text: str) -> int:
    """Reads an argument that is a whole number of at least 0."""
    return _int(text, 0)


def _int(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value


def expand_images(arguments: Iterable[str]) -> list[str]:
    """Replaces each folder by the images below it. Raises ValueError for a folder without any."""
    from opencoca.data import list_images

    paths: list[str] = []
    for argument in arguments:
        folder = Path(argument)
        paths += [str(folder / key) for key in list_images(folder)] if folder.is_dir() else [argument]
    return paths


def shows_progress() -> bool:
    """Whether to show a progress bar: only where no results are printed into the same window."""
    return sys.stderr.isatty() and not sys.stdout.isatty()


def complain(sentence: str) -> None:
    """Prints a sentence on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"opencoca: {sentence}", file=sys.stderr)


def check_writable(*paths: str | Path | None) -> None:
    """Checks before the work begins that its results can be stored. Raises ValueError that names the file."""
    for path in filter(None, paths):
        target = Path(path)
        if target.exists() and not target.is_file():
            raise ValueError(f"cannot write {path}: it is not an ordinary file; choose another name")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target.parent):
                pass
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"cannot write {path} ({reason}); choose a folder that you may write to") from error


def read_lines(path: str | Path, content: str) -> list[str]:
    """Reads the lines of a UTF-8 text file that are not empty. Raises ValueError that says what its content is."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the {content} in {str(path)!r}: it is not UTF-8 text ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def format_table(rows: Sequence[tuple[str, str]]) -> str:
    """Formats names, aligned on the left, and values, aligned on the right."""
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in rows)
