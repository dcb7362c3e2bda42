"""Shared by all commands: the parser, common options, lists of images, output as tables and JSON files."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opencoca.cli.parser import CommandError, HelpFormatter, Parser
from opencoca.cli.streams import complain

if TYPE_CHECKING:
    from opencoca.data import SampleSource, ShardStorage
    from opencoca.inference.pipeline import Pipeline

Run = Callable[[argparse.Namespace], int]
stdout_is_closed = False
"""Whether what is printed is lost; `main` finds out."""
_INPUTS = (
    "image files; folders, searched with their sub-folders; globs in quotes ('photos/**/*.jpg'); tar shards "
    "('shards/{0000..0099}.tar'); CSV, TSV, JSON lines or Parquet tables with a column of images; or - for standard "
    "input: an image, or any of these names, one a line"
)


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
    """Adds --model, --language, --device, --dtype and --verbose, which `load_pipeline` reads."""
    parser.add_argument(
        "--model",
        metavar="M",
        help="name of a model (`opencoca models` lists them), folder of a model or of a training run, or "
        "hf-hub:ORGANISATION/NAME (default: the model that comes with the package)",
    )
    parser.add_argument(
        "--language",
        metavar="L",
        help="language of captions and texts, such as zh, for a model that has several (default: its first)",
    )
    parser.add_argument(
        "--device", default="auto", metavar="D", help="auto (CUDA if there is a GPU), cpu, cuda, cuda:N or mps"
    )
    parser.add_argument(
        "--dtype", metavar="T", help="floating-point type: float32, bfloat16 or float16 (default: float32)"
    )
    parser.add_argument("--verbose", action="store_true", help="say on stderr what was chosen")


def add_images(parser: Parser, nargs: str = "+") -> None:
    """Adds the images that a command works on, and how tables name them, for `open_images`."""
    parser.add_argument("images", nargs=nargs, metavar="IMAGE", help=_INPUTS)
    tables = parser.add_rare_group("tables of images")
    tables.add_argument(
        "--image-column",
        default="image",
        metavar="C",
        help="column of the tables that names image files or, in Parquet, contains the images",
    )
    tables.add_argument(
        "--image-root", metavar="DIR", help="folder that image files in tables are relative to (default: the table's)"
    )
    add_reading(parser)


def add_reading(parser: Parser) -> None:
    """Adds --max-pixels, --image-member and --text-member, which `shard_storage` reads."""
    add_members(parser).add_argument(
        "--max-pixels", type=positive_int, metavar="N", help="pixels of the largest image (default: 178,956,970)"
    )


def add_members(parser: Parser) -> Any:
    """Adds --image-member and --text-member, and returns the group of options that they are in."""
    group = parser.add_rare_group("reading images")
    for kind, example, default in (("image", "seg.png", "any image's"), ("text", "alt.txt", "txt")):
        text = f"ending of the members of tar shards that are a sample's {kind}, such as {example} (default: {default})"
        group.add_argument(f"--{kind}-member", metavar="E", help=text)
    return group


def shard_storage(arguments: argparse.Namespace) -> "ShardStorage":
    """What is read of shards, as `add_reading` or `add_members` has it. It also allows larger images from now on."""
    from opencoca.data import ShardStorage, allow_pixels

    if (most := getattr(arguments, "max_pixels", None)) is not None:
        allow_pixels(most)
    return ShardStorage(image_member=arguments.image_member, text_member=arguments.text_member)


def open_images(arguments: argparse.Namespace) -> "SampleSource":
    """Opens the images of `add_images`."""
    from opencoca.recaption import open_inputs

    return open_inputs(
        arguments.images,
        image_column=arguments.image_column,
        image_root=arguments.image_root,
        storage=shard_storage(arguments),
    )


def add_overwrite(parser: Any) -> None:
    """Adds --overwrite, which `check_new` and `check_new_folder` read."""
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist already")


def add_model_options(parser: argparse.ArgumentParser, batch_size: int | None = 32) -> None:
    """Adds the options of `add_load_options` and --batch-size; its default None means as many as fit into memory."""
    add_load_options(parser)
    text = "images at a time" if batch_size else "images at a time (default: as many as fit into --memory)"
    parser.add_argument("--batch-size", type=positive_int, default=batch_size, metavar="N", help=text)


def add_model_and_folder(parser: argparse.ArgumentParser, out_dir: str = "folder to write") -> None:
    """Adds the arguments MODEL and OUT_DIR."""
    parser.add_argument("model", metavar="MODEL", help="name of a model, or a model's or training run's folder")
    parser.add_argument("out_dir", metavar="OUT_DIR", help=out_dir)


def add_source(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds --images, for commands that work on a data set."""
    parser.add_argument("--images", required=required, metavar="DIR", help="folder of images, tar shards, or a table")


def add_captioned_images(parser: Parser, required: bool) -> None:
    """Adds the options that `open_captioned` reads: images, captions, what is read of them and how many."""
    add_source(parser, required)
    parser.add_argument(
        "--captions",
        metavar="CSV",
        help="table (CSV, TSV, JSONL, JSON or Parquet) with the columns image and caption; several captions of an "
        "image are several rows or a list; tar shards and tables of images contain their own captions",
    )
    add_columns(parser, "image", "caption")
    parser.add_rare_group("languages").add_argument(
        "--language-column",
        metavar="NAME",
        help="the tables' column with the language of each row; with --language, only its rows are read (default: "
        "language or lang, if there is one)",
    )
    add_limit(parser)
    add_reading(parser)


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
    """The images and captions that --images, --captions, --language and --limit name."""
    from opencoca.data import ImageFolder, open_source
    from opencoca.data.languages import NO_LANGUAGES, CaptionLanguages

    columns = {"image_column": arguments.image_column, "caption_column": arguments.caption_column}
    column, language = arguments.language_column, getattr(arguments, "language", None)
    columns["languages"] = NO_LANGUAGES
    if column or language:
        columns["languages"] = CaptionLanguages(column or "language", language, column_must_be=bool(column))
    source = open_source(arguments.images, arguments.captions, **columns, storage=shard_storage(arguments))
    if isinstance(source, ImageFolder) and not any(source.captions(index) for index in range(len(source))):
        raise CommandError(f"{arguments.images!r} is a folder of images without captions; add --captions CSV")
    return some_images(source, arguments.limit)


def some_images(source: "SampleSource", limit: int | None) -> "SampleSource":
    """The first images of a source, at most `limit`."""
    from opencoca.data import Subset

    return source if limit is None else Subset(source, range(min(limit, len(source))))


def load_pipeline(arguments: argparse.Namespace, threads: int | None = None) -> "Pipeline":
    """Loads the model that --model, --device, --dtype and --language name; freed memory is kept for the next batch.

    threads: of what is continued; None = as many as processors are free.
    """
    import torch

    from opencoca.inference.loading import DEFAULT_MODEL, load
    from opencoca.system.allocator import keep_freed_memory

    keep_freed_memory()
    busy = choose_threads(arguments.device, threads)
    pipeline = load(arguments.model, arguments.device, arguments.dtype).in_language(arguments.language)
    if getattr(arguments, "verbose", False):
        dtype = str(pipeline.dtype).removeprefix("torch.")
        count = torch.get_num_threads()
        chosen = busy or f"{count} thread{'s' * (count != 1)}"
        where = f"cpu, {chosen}" if pipeline.device.type == "cpu" else pipeline.device
        complain(f"model {arguments.model or DEFAULT_MODEL} in {dtype} on {where}")
    return pipeline


def choose_threads(device: str = "cpu", wanted: int | None = None) -> str | None:
    """On a CPU, uses as many threads as processors are free, or ``wanted``; returns a line if others are busy.

    Every command that computes calls it before it does.
    """
    from opencoca.system.cpu import limit_threads
    from opencoca.system.devices import choose_device

    return limit_threads(wanted) if choose_device(device).type == "cpu" else None


def positive_int(text: str) -> int:
    """Reads an argument that is a whole number of at least 1."""
    return _int(text, 1)


def non_negative_int(text: str) -> int:
    """Reads an argument that is a whole number of at least 0."""
    return _int(text, 0)


_LARGEST_INT = 10**12


def _int(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    if value > _LARGEST_INT:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is more than {_LARGEST_INT:,}")
    return value


def shows_progress() -> bool:
    """Whether to show a progress bar: only where no results are printed into the same window."""
    return sys.stderr.isatty() and not sys.stdout.isatty()


def check_printable() -> None:
    """Raises CommandError if results would be printed into a stdout that is closed."""
    if stdout_is_closed:
        raise CommandError("there is nowhere to print the results: standard output is closed; leave it open")


def check_new(arguments: argparse.Namespace, *paths: str | Path | None) -> None:
    """Checks before the work begins that files can be written and, without --overwrite, that none exists yet."""
    from opencoca.system.files import check_writable

    check_writable(*paths)
    for path in filter(None, paths):
        if os.path.lexists(path) and not arguments.overwrite:
            raise CommandError(f"{path} exists already; choose another name, or replace it with --overwrite")


def check_new_folder(arguments: argparse.Namespace, folder: str | Path, file: str) -> None:
    """Checks before the work begins that files can be written into a folder and, without --overwrite, that it is empty.

    file: the name of one of them.
    """
    from opencoca.system.files import check_writable

    if not arguments.overwrite and os.path.isdir(folder) and os.listdir(folder):
        raise CommandError(f"{folder} is not empty; name a new folder, or replace the files in it with --overwrite")
    check_writable(Path(folder) / file)


def format_table(rows: Sequence[tuple[str, str]]) -> str:
    """Formats names, aligned on the left, and values, aligned on the right."""
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in rows)
