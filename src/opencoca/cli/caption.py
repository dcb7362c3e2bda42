"""`opencoca caption`: captions for images, folders, tar shards and tables, printed or written to files."""

import argparse
import json
from functools import partial
from typing import TYPE_CHECKING, Any

from opencoca.cli.common import (
    CommandError,
    add_command,
    add_images,
    add_model_options,
    check_printable,
    load_pipeline,
    open_images,
    shows_progress,
)
from opencoca.cli.generation_options import add_generation_options, chosen_generation_options
from opencoca.cli.streams import complain, complain_of_left_out
from opencoca.system.messages import escaped

if TYPE_CHECKING:
    from opencoca.data import SampleSource
    from opencoca.generation import GenerationOptions
    from opencoca.recaption import Destination, RunReport

_DETAILS = """\
--out FILE writes a row for each caption: image, caption, log_probability (in nats), length (in tokens), flags; rank (0
is the best) if images have several captions; similarity (of image and caption) if they were reranked; and similarity
and confidence (the probability that the caption is right) if the model's folder has a calibration. Finished batches are
kept on disk in FILE.journal: after a kill, a power cut or a full disk, the same command continues, and the result
equals that of an uninterrupted run. If the model, an option or the images have changed, the command refuses to
continue; --overwrite starts over. FILE.run.json says how the captions were made.

Flags mark suspicious captions: near-empty (fewer than 2 words), repetition (a word or phrase 3 times or more in
a row, or 10 words or more of whose neighbouring pairs fewer than half are distinct), common (at least 5% of all images
have the same caption).

With --out, images that cannot be read are also listed in FILE.errors.jsonl."""


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "caption",
        run_caption,
        "Write captions for images: printed, in a file, or as text files beside the images.",
        example="opencoca caption photo.jpg\n"
        "  opencoca caption holiday/ --out captions.jsonl --num-beams 4\n"
        "  find . -name '*.jpg' | opencoca caption - --json",
        more="Without --out and --beside, captions are printed: PATH<TAB>CAPTION. An image that cannot be read is\n"
        "reported; the others are captioned, and the exit code is 2. A run with --out or --beside that was stopped\n"
        "continues when it is started again.",
    )
    parser.details = _DETAILS
    add_images(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object on each line: image, caption, log_probability, length, "
        "and confidence if the model has a calibration",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--out", metavar="FILE", help="write the captions to a .jsonl, .csv or .parquet file")
    files.add_argument(
        "--beside", action="store_true", help="write photo.txt beside each photo.jpg, with a line for each caption"
    )
    files.add_argument("--overwrite", action="store_true", help="start over and replace what an earlier run wrote")
    add_generation_options(parser)
    parser.add_rare_group("memory").add_argument(
        "--memory",
        metavar="SIZE",
        help="memory for a batch, such as 4GB (default: half of what is free); it decides "
        "how many images are captioned at a time",
    )
    add_model_options(parser, batch_size=None)


def run_caption(arguments: argparse.Namespace) -> int:
    from opencoca.recaption import Destination, parse_bytes

    _check_arguments(arguments)
    options = chosen_generation_options(arguments)
    memory_bytes = parse_bytes(arguments.memory) if arguments.memory else None
    source = open_images(arguments)
    if not (arguments.out or arguments.beside):
        check_printable()
        _print_captions(arguments, source, options, memory_bytes)
    else:
        destination = Destination.of(source, arguments.out, arguments.beside)
        destination.check()
        return _write_captions(arguments, source, destination, options, memory_bytes)
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.memory and arguments.batch_size:
        raise CommandError("--memory and --batch-size both say how many images at a time; give one of them")
    if arguments.json and (arguments.out or arguments.beside):
        raise CommandError("--json is for captions that are printed; --out FILE.jsonl writes JSON lines")
    if arguments.overwrite and not (arguments.out or arguments.beside):
        raise CommandError("--overwrite is for files; give --out or --beside too")


def _print_captions(
    arguments: argparse.Namespace,
    source: "SampleSource",
    options: "GenerationOptions",
    memory_bytes: int | None,
) -> None:
    from tqdm import tqdm

    from opencoca.recaption import Captioner, caption_source, choose_batch_size
    from opencoca.recaption.captioner import output_rows, to_journal_row

    captioner = Captioner(load_pipeline(arguments), options, arguments.rerank)
    batch_size = arguments.batch_size or choose_batch_size(captioner, len(source), memory_bytes)
    _tell_batch_size(arguments, batch_size)
    with tqdm(total=len(source), desc="captioning", unit="image", disable=not shows_progress()) as bar:
        for batch in caption_source(captioner, source, batch_size):
            for image in batch:
                if image.error is not None:
                    complain_of_left_out(image.error)
                for row in output_rows(to_journal_row(image)):
                    text = " ".join(row["caption"].split())
                    line = f"{escaped(row['image'])}\t{text}"
                    print(json.dumps(row, ensure_ascii=False) if arguments.json else line)
            bar.update(len(batch))


def _write_captions(
    arguments: argparse.Namespace,
    source: "SampleSource",
    destination: "Destination",
    options: "GenerationOptions",
    memory_bytes: int | None,
) -> int:
    from opencoca.recaption import Captioner, caption_to_files, journal_threads

    threads = None if arguments.overwrite else journal_threads(destination.journal)
    try:
        report = caption_to_files(
            Captioner(load_pipeline(arguments, threads), options, arguments.rerank),
            source,
            destination,
            batch_size=arguments.batch_size,
            memory_bytes=memory_bytes,
            overwrite=arguments.overwrite,
            progress=True,
            on_error=complain,
            on_note=complain,
            on_batch_size=partial(_tell_batch_size, arguments),
        )
    except KeyboardInterrupt:
        if destination.journal.exists():
            complain("the images that are done are kept; the same command continues from there")
        raise
    print(_summary(report, destination))
    return 2 if report.unreadable else 0  # those of an earlier part of the run count too


def _tell_batch_size(arguments: argparse.Namespace, batch_size: int) -> None:
    if arguments.verbose:
        complain(f"{batch_size} images at a time")


def _summary(report: "RunReport", destination: "Destination") -> str:
    places = [str(destination.out)] if destination.out else []
    if destination.texts:
        places.append("text files beside the images")
    found = [f"{count:,} {name}" for name, count in report.flags.items() if count]
    parts = [f"{report.captions:,} captions of {report.images - report.unreadable:,} images in {' and '.join(places)}"]
    if found:
        parts.append(f"flagged: {', '.join(found)}")
    if report.unreadable:
        parts.append(f"{report.unreadable:,} images could not be read: {destination.errors}")
    return "; ".join(parts)
