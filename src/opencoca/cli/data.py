"""`opencoca data`: checks a data set before training, packs it into tar shards, and indexes shards."""

import argparse
import sys
from typing import Any

from opencoca.cli.common import (
    CommandError,
    add_columns,
    add_command,
    add_group,
    add_members,
    add_overwrite,
    add_reading,
    check_new,
    non_negative_int,
    positive_int,
    shard_storage,
)
from opencoca.cli.streams import complain_of_left_out
from opencoca.system.messages import brief


def add_commands(commands: Any) -> None:
    group = add_group(commands, "data", "Check a data set, pack it into tar shards, or index shards.")
    check = add_command(
        group,
        "check",
        run_check,
        "Decode every image, look at every caption and label, and list what is broken, missing, empty or there twice.",
        example="opencoca data check --images DIR --captions train.csv",
        more="The exit code is 2 if anything is broken, missing or empty; duplicates alone are no fault.",
    )
    check.add_argument("source", nargs="?", metavar="SOURCE", help="folder of images, tar shards, or a table")
    check.add_argument("--json", metavar="FILE", help="write the whole report, every finding included")
    add_overwrite(check)
    pack = add_command(
        group,
        "pack",
        run_pack,
        "Pack images, captions and labels into tar shards (image, txt, json, cls for each): faster than small files.",
        example="opencoca data pack --images DIR --captions train.csv --out shards --resize 288",
        more="The same input gives the same bytes; a run that was stopped continues when it is started again. Images\n"
        "that cannot be read are left out and listed in errors.jsonl; the exit code is then 2.",
    )
    pack.add_argument("--out", required=True, metavar="DIR", help="folder for the shards, created if needed")
    pack.add_argument("--samples-per-shard", type=positive_int, default=1000, metavar="N", help="images in each shard")
    pack.add_argument(
        "--resize", type=positive_int, metavar="N", help="shrink images to a shorter side of N pixels (default: never)"
    )
    pack.add_argument("--quality", type=positive_int, default=95, metavar="N", help="JPEG quality if resized, 1 to 100")
    _add_index(group)
    for parser in (check, pack):
        parser.add_argument("--images", metavar="DIR", help="folder of images, tar shards, or a table")
        parser.add_argument(
            "--captions", metavar="CSV", help="table (CSV, TSV, JSONL, JSON or Parquet) with columns image and caption"
        )
        parser.add_argument(
            "--labels",
            metavar="CSV",
            help="table with the columns image and label, which may be that of captions; or `folders`: the folder that "
            "an image lies in is its class",
        )
        add_columns(parser, "image", "caption", "label")
        parser.add_argument("--num-workers", type=non_negative_int, default=4, metavar="N", help="decoding threads")
        add_reading(parser)


def _add_index(group: Any) -> None:
    index = add_command(
        group,
        "index",
        run_index,
        "Find out where each sample lies in tar shards, so that training can read any of them with one request.",
        example="opencoca data index 's3://bucket/cc3m/{00000..00331}.tar'",
        more="A small file beside each shard holds its index. Local shards get theirs by themselves at first use; "
        "remote ones\n(http://, https://, s3://, gs://) must have one before training. Shards that have a valid index "
        "are passed over, so a run\nthat was stopped continues when it is started again. Damaged shards are named; "
        "their whole samples are used, and the exit code is 2.",
    )
    index.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="tar files, folders of them, and patterns with {00000..00099} or *"
    )
    index.add_argument(
        "--index-dir", metavar="DIR", help="put the indexes there (web servers take none); training needs the same"
    )
    add_members(index)
    index.add_argument("--force", action="store_true", help="also scan shards that have a valid index")
    index.add_argument("--num-workers", type=positive_int, default=4, metavar="N", help="shards at a time")


def run_index(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from opencoca.data import find_shards, index_shards
    from opencoca.data.shards import ChosenMembers
    from opencoca.data.tar_source import damage_report

    paths = list(dict.fromkeys(path for pattern in arguments.shards for path in find_shards(pattern)))
    done = index_shards(
        paths,
        index_dir=arguments.index_dir,
        chosen=ChosenMembers(arguments.image_member, arguments.text_member),
        force=arguments.force,
        num_workers=arguments.num_workers,
    )
    samples = lost = damaged = new = 0
    for shard in tqdm(done, total=len(paths), desc="indexing", unit="shard", disable=not sys.stderr.isatty()):
        samples += len(shard.index.keys)
        lost += len(shard.index.lost)
        new += shard.is_new
        if shard.index.damage or shard.index.lost:
            complain_of_left_out(damage_report(shard.path, shard.index))
        damaged += bool(shard.index.damage)
    print(f"{samples:,} samples in {len(paths):,} shards ({new:,} of them newly indexed)")
    if lost or damaged:
        print(f"{damaged:,} shards are damaged; {lost:,} samples in all have lost their image or another part")
    if not samples:
        raise CommandError("these shards hold no images")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    if (arguments.source is None) == (arguments.images is None):
        raise CommandError("give the images once: as SOURCE, or with --images DIR")
    check_new(arguments, arguments.json)
    from opencoca.data import check_source, format_report

    source = _open(arguments, arguments.source or arguments.images, strict=False)
    report = check_source(source, num_workers=arguments.num_workers)
    print(format_report(report))
    if arguments.json:
        from opencoca.system.files import write_json

        write_json(arguments.json, report.to_dict())
    if report.errors:
        found = ", ".join(f"{len(those):,} {name}" for name, those in report.errors.items())
        raise CommandError(f"found {found}")
    return 0


def run_pack(arguments: argparse.Namespace) -> int:
    if arguments.images is None:
        raise CommandError("there is nothing to pack; add --images DIR")
    from opencoca.data import pack_shards

    source = _open(arguments, arguments.images, strict=True)
    summary = pack_shards(
        source,
        arguments.out,
        samples_per_shard=arguments.samples_per_shard,
        resize=arguments.resize,
        quality=arguments.quality,
        num_workers=arguments.num_workers,
    )
    print(
        f"{arguments.out}: {summary.num_samples:,} samples in {summary.num_shards:,} shards "
        f"({summary.num_shards_written:,} of them new), {summary.size_bytes / 1e6:,.1f} MB"
    )
    if summary.errors:
        count, first = len(summary.errors), brief(summary.errors[0], 200)
        raise CommandError(f"{count:,} images cannot be read and were left out; see errors.jsonl there ({first})")
    return 0


def _open(arguments: argparse.Namespace, images: str, strict: bool) -> Any:
    from opencoca.data import open_source

    return open_source(
        images,
        arguments.captions,
        arguments.labels,
        image_column=arguments.image_column,
        caption_column=arguments.caption_column,
        label_column=arguments.label_column,
        strict=strict,
        storage=shard_storage(arguments),
    )
