"""Opens folders, tables and tar shards, as users name them, as sources of samples."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from opencoca.data.compressed import is_shard_name
from opencoca.data.images import IMAGE_SUFFIXES
from opencoca.data.remote import find_remote, is_remote
from opencoca.data.source import SampleSource
from opencoca.data.sources import ImageFolder
from opencoca.data.tables import SampleTable, Table, TableColumns, read_table
from opencoca.data.tar_source import ShardStorage, TarShards
from opencoca.data.targets import class_folder

FOLDERS = "folders"
"""In place of a table of labels: the folder that an image lies in names its class."""

_METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def open_source(
    images: str | Path,
    captions: str | Path | None = None,
    labels: str | Path | None = None,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    label_column: str = "label",
    strict: bool = True,
    storage: ShardStorage | None = None,
) -> SampleSource:
    """Open images, with their captions and targets if there are any.

    A folder that has a `metadata.csv`, `metadata.jsonl` or `metadata.parquet` with the column `file_name` (Hugging
    Face's imagefolder) gets its captions (column `text`, or as named here) and labels from there, unless others are
    given.

    Args:
        images: a folder of images, searched with its subfolders if no table names them; or tar shards: one `.tar`, a
            folder of them, or a pattern such as `shards/*.tar` or `s3://bucket/{00000..00099}.tar`; see `find_shards`.
        captions: a CSV, TSV, JSON lines or Parquet table for a folder of images; shards carry their own.
        labels: such a table with classes or answers, which may be the same one; or `folders`: the folder that an image
            lies in names its class. Shards carry their own if it is None.
        image_column: the tables' column of image names, relative to `images`; a list of them is a sample of several.
        caption_column: the table's column of captions (for shards, the field of a sample's json).
        label_column: the table's column of labels (for shards, the field of a sample's json); see `parse_target`.
        strict: whether images that a table names but that don't exist are an error; else they are listed in the
            source's `missing_images`.
        storage: where the indexes of shards lie, and what is kept of remote ones.

    Raises:
        FileNotFoundError: a folder, table, shard, or image named by a table doesn't exist.
        ValueError: an empty folder, an unusable table, no captions or no labels at all in a table.
    """
    by_folder = labels == FOLDERS
    given = [table for table in (captions, labels) if table is not None and table != FOLDERS]
    if shards := _shards_of(images, given):
        field = None if by_folder else label_column
        return TarShards(shards, caption_field=caption_column, label_field=field, storage=storage)
    folder, columns = Path(images), TableColumns(image_column, caption_column, label_column)
    if len(given) == 2 and captions != labels:
        tables = [(Path(given[0]), columns._replace(label=None)), (Path(given[1]), columns._replace(caption=None))]
    elif given:
        own = {} if captions == labels else {"label": None} if captions is not None else {"caption": None}
        tables = [(Path(given[0]), columns._replace(**own))]
    else:
        tables = [] if by_folder else _metadata_of(folder, columns)
    if not tables:
        keys = list_images(folder)
        if by_folder and not any(map(class_folder, keys)):
            raise ValueError(f"no image of {str(images)!r} lies in a sub-folder named after its class")
        return ImageFolder(folder, keys, targets=FOLDERS if by_folder else None)
    return _folder_of(folder, tables, by_folder, strict)


def open_labelled(
    images: str | Path, labels: str | Path | None = None, *, image_column: str = "image", label_column: str = "label"
) -> SampleSource:
    """Images of which each has one class: from a table, or named by the folder that it lies in without one.

    Raises:
        FileNotFoundError: a folder, the table, or an image that it names does not exist.
        ValueError: no images, or an image that has no class or several labels.
    """
    by_folder = labels is None and not _shards_of(images, [])
    source = open_source(
        images, labels=FOLDERS if by_folder else labels, image_column=image_column, label_column=label_column
    )
    where = repr(str(labels or images))
    for index in range(len(source)):
        target, key = source.target(index), source.key(index)
        if isinstance(target, str):
            continue
        if target is None and by_folder:
            raise ValueError(
                f"the image {key!r} lies in {where} itself, not in a sub-folder named after its class; "
                "move it there, or give a table of labels"
            )
        found = "no label" if target is None else f"{len(target)} labels ({', '.join(target)})"
        raise ValueError(f"the image {key!r} has {found} in {where}; give each image one")
    return source


def _shards_of(images: str | Path, tables: list[str | Path]) -> list[str]:
    """Finds the shards that `images` names; none if it is a folder of images."""
    if not is_remote(images) and Path(images).is_dir():
        return [] if tables else _shards_in(Path(images))
    if is_remote(images) or is_shard_name(images):
        shards = find_shards(str(images))
        if tables:
            raise ValueError(f"tar shards carry their captions and labels themselves; leave {str(tables[0])!r} out")
        return shards
    if Path(images).is_file():
        raise ValueError(f"{str(images)!r} is neither a folder of images nor a .tar shard")
    raise FileNotFoundError(f"there is no folder of images {str(images)!r}")


def _metadata_of(folder: Path, columns: TableColumns) -> list[tuple[Path, TableColumns]]:
    """Finds Hugging Face's table of a folder of images, if it has one with captions or labels."""
    for path in (folder / name for name in _METADATA_FILES):
        names = Table(path).columns if path.is_file() else ()
        caption = next((name for name in (columns.caption, "text") if name in names), None)
        label = columns.label if columns.label in names else None
        if "file_name" in names and (caption or label):
            return [(path, TableColumns("file_name", caption, label))]
    return []


def _folder_of(folder: Path, tables: list[tuple[Path, TableColumns]], by_folder: bool, strict: bool) -> ImageFolder:
    """Makes a source of the samples whose images exist. Raises ValueError for a table without captions and labels."""
    whole = SampleTable()
    for path, columns in tables:
        table = read_table(path, columns, images_root=folder)
        if not table.targets and not any(table.captions.values()) and (strict or not table.captions):
            raise ValueError(f"the table {str(path)!r} holds no {'captions' if columns.caption else 'labels'}")
        whole.join(table)
    files = {key: whole.images.get(key, (key,)) for key in whole.captions}
    missing = [name for names in files.values() for name in names if not (folder / name).is_file()]
    if missing and strict:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} images that {' and '.join(repr(str(path)) for path, _ in tables)} "
            f"names are not in {str(folder)!r}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; "
            "remove their rows or add the images"
        )
    absent = set(missing)
    return ImageFolder(
        folder,
        [key for key, names in files.items() if absent.isdisjoint(names)],
        whole.captions,
        FOLDERS if by_folder else whole.targets,
        images=whole.images,
        missing_images=missing,
        blank_captions=whole.blank,
    )


def find_shards(pattern: str) -> list[str]:
    """Paths or URLs of the shards that a pattern names, sorted within each of its braces.

    A pattern is a file, a folder of `.tar` files (also compressed ones: `.tar.gz`, `.tar.zst`), or a name with
    `{00000..00099}`, `{a,b}` and `*`; web servers (http, https) list nothing, so there names must be spelled out, with
    braces.

    Raises:
        FileNotFoundError: nothing matches a part of the pattern.
        ValueError: a wildcard or folder on a web server.
    """
    if os.path.exists(pattern):
        found = _shards_in(Path(pattern)) if os.path.isdir(pattern) else [pattern]
        if not found:
            raise FileNotFoundError(f"there are no tar shards in {pattern!r}")
        return found
    shards: list[str] = []
    for name in _expand_braces(pattern):
        if is_remote(name) and not is_shard_name(name):
            name = f"{name.rstrip('/')}/*.tar"
        if not glob.has_magic(name):
            found = [name] if is_remote(name) or os.path.exists(name) else []
        elif name.startswith(("http://", "https://")):
            example = f"{pattern.rpartition('/')[0]}/{{00000..00099}}.tar"
            raise ValueError(f"a web server lists no files, so {name!r} cannot be found; spell them out: {example!r}")
        else:
            found = find_remote(name) if is_remote(name) else sorted(glob.glob(name))
        if not found:
            raise FileNotFoundError(f"there are no tar shards {name!r}")
        shards += found
    return shards


def _shards_in(folder: Path) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if is_shard_name(name) and not name.startswith("."))
    return [str(path) for path in map(folder.joinpath, names) if path.is_file()]


def _expand_braces(pattern: str) -> Iterator[str]:
    """`{a,b}/{0..2}.tar` -> `a/0.tar`, `a/1.tar`, `a/2.tar`, `b/0.tar`, ..."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    choices = match[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = span.groups()
        width = len(first) if len(first) == len(last) or first.startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def list_images(folder: str | Path) -> list[str]:
    """Paths of all image files below `folder`, relative to it, sorted; hidden files and folders are left out.

    Raises FileNotFoundError for a missing folder, ValueError for one without any image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of images {str(folder)!r}")
    keys: list[str] = []
    visited: set[str] = set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link that leads back up
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                keys.append(Path(parent, name).relative_to(folder).as_posix())
    if not keys:
        raise ValueError(f"the folder {str(folder)!r} holds no images")
    return sorted(keys)
