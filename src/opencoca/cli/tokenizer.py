"""`opencoca tokenizer train`: makes a vocabulary from captions."""

import argparse
import sys
from pathlib import Path
from typing import Any

from opencoca.cli.common import (
    CommandError,
    add_command,
    add_group,
    add_members,
    add_overwrite,
    check_new,
    positive_int,
    shard_storage,
)
from opencoca.system.reading import read_lines


def add_commands(commands: Any) -> None:
    group = add_group(commands, "tokenizer", "Make a vocabulary from your own captions.")
    train = add_command(
        group,
        "train",
        run_train,
        "Train a byte-level BPE vocabulary on captions.",
        example="opencoca tokenizer train train.csv --out tokenizer.json --vocab-size 8000",
    )
    train.add_argument(
        "captions",
        nargs="+",
        metavar="CAPTIONS",
        help="tables (CSV, TSV, JSONL or Parquet) with a caption column, .txt files with a caption on each line, or "
        "tar shards",
    )
    train.add_argument(
        "--out", required=True, metavar="FILE", help="tokenizer to write: a name that ends in .json, or a folder"
    )
    add_overwrite(train)
    train.add_argument(
        "--vocab-size", type=positive_int, default=8000, metavar="N", help="number of token ids, 259 to 65536"
    )
    train.add_argument(
        "--min-frequency",
        type=positive_int,
        default=2,
        metavar="N",
        help="how often a pair of tokens must occur to become one token",
    )
    train.add_argument(
        "--languages",
        default="",
        metavar="L,L",
        help="languages of the captions, such as en,zh, the default first; each gets a token (default: none)",
    )
    train.add_argument("--keep-case", action="store_true", help="keep capital letters (default: all lower case)")
    train.add_argument("--keep-final-period", action="store_true", help="do not drop the full stop at a caption's end")
    train.add_argument("--caption-column", default="caption", metavar="NAME", help="column of captions in the tables")
    add_members(train)


def run_train(arguments: argparse.Namespace) -> int:
    from opencoca.tokenizer import FILE_NAME, train_tokenizer

    out = Path(arguments.out)
    if out.is_dir() or out.suffix != ".json":
        out /= FILE_NAME
    check_new(arguments, out)
    captions = [text for path in arguments.captions for text in _read_captions(path, arguments)]
    if not captions:
        raise CommandError(f"there are no captions in {', '.join(arguments.captions)}")
    tokenizer = train_tokenizer(
        captions,
        arguments.vocab_size,
        lowercase=not arguments.keep_case,
        strip_final_period=not arguments.keep_final_period,
        min_frequency=arguments.min_frequency,
        languages=[name.strip() for name in arguments.languages.split(",") if name.strip()],
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.save(out)
    print(f"{out}: {tokenizer.vocab_size:,} token ids from {len(captions):,} captions")
    return 0


def _read_captions(path: str, arguments: argparse.Namespace) -> list[str]:
    from opencoca.data import open_source
    from opencoca.data.compressed import is_shard_name
    from opencoca.data.tables import TABLE_SUFFIXES, Table, TableColumns

    suffix, column = Path(path).suffix.lower(), arguments.caption_column
    if is_shard_name(path) or Path(path).is_dir():
        source = open_source(path, caption_column=column, storage=shard_storage(arguments))
        return [text for index in range(len(source)) for text in source.captions(index)]
    if suffix not in (".txt", *TABLE_SUFFIXES):
        endings = ", ".join((".txt", ".tar", *TABLE_SUFFIXES))
        raise ValueError(f"cannot read the captions in {path!r}: its ending is none of {endings}")
    if "://" not in path and not Path(path).is_file():
        raise FileNotFoundError(f"there is no file of captions {path!r}")
    if suffix == ".txt":
        return read_lines(path, "captions")
    return [text for row in Table(path).rows(TableColumns(None, column)) for text in row.captions if text]
