"""Opens folders, tables and tar shards, as users name them, as sources of samples."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from opencoca.data.compressed import is_shard_name
from opencoca.data.images import IMAGE_SUFFIXES
from opencoca.data.languages import NO_LANGUAGES, CaptionLanguages, in_language
from opencoca.data.recaptioned import Recaptioned
from opencoca.data.remote import find_remote, is_remote
from opencoca.data.sidecars import read_sidecars
from opencoca.data.source import SampleSource
from opencoca.data.sources import ImageFolder, JoinedSource, Subset
from opencoca.data.table_images import TableImages
from opencoca.data.tables import SampleTable, Table, TableColumns, is_table, read_table, split_of
from opencoca.data.tar_source import ShardStorage, TarShards
from opencoca.data.targets import class_folder
from opencoca.system.messages import brief, shown
from opencoca.system.reading import download_first

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
    languages: CaptionLanguages = NO_LANGUAGES,
    strict: bool = True,
    storage: ShardStorage | None = None,
) -> SampleSource:
    """Open images, with their captions and targets if there are any.

    Captions and labels that are not given are looked for where the images are: in the `metadata.csv`, `.jsonl` or
    `.parquet` of Hugging Face's imagefolder, else in the text files beside the images (`photo.txt` or `photo.caption`,
    a caption on each line).

    Args:
        images: a folder of images, searched with its subfolders if no table names them; a table that names images
            relative to its own folder, or that holds them, a pattern or a folder of such tables; or tar shards: one
            `.tar`, a folder of them, or a pattern such as `shards/*.tar` or `s3://bucket/{00000..00099}.tar`; see
            `find_shards`.
        captions: a table (CSV, TSV, JSON lines, JSON, Parquet), in place of captions that shards and tables of images
            carry themselves; see `Recaptioned` for the names of their samples.
        labels: such a table with classes or answers, which may be the same one; or `folders`: the folder that an image
            lies in names its class. Shards carry their own if it is None.
        image_column: the tables' column of image names, relative to `images`; a list of them is a sample of several.
        caption_column: the table's column of captions (for shards, the field of a sample's json).
        label_column: the table's column of labels (for shards, the field of a sample's json); see `parse_target`.
        languages: which languages captions are in. Of shards' own captions it can be one for all.
        strict: whether images that a table names but that don't exist are an error; else they are listed in the
            source's `missing_images`.
        storage: where the indexes of shards lie, and what is kept of remote ones.

    Raises:
        FileNotFoundError: a folder, table, shard, or image named by a table doesn't exist.
        ValueError: an empty folder, an unusable table, no captions or no labels at all in a table.
    """
    by_folder = labels == FOLDERS
    given = [table for table in (captions, labels) if table is not None and table != FOLDERS]
    columns = TableColumns(image_column, caption_column, label_column, languages)
    tables = _given_tables(captions, None if by_folder else labels, columns)
    source = None
    if of_images := _tables_of_images(images):
        if by_folder:
            raise ValueError(f"{shown(str(images))} is a table, and its images lie in no folders; leave the labels out")
        own = columns._replace(
            caption=None if captions is not None else caption_column, label=None if labels is not None else label_column
        )
        source = _joined([_of_table(Table(path), own, strict) for path in of_images])
    elif shards := _shards_of(images, bool(given)):
        field = None if by_folder else label_column
        if languages.column and languages.column_must_be and captions is None:
            raise ValueError(
                f"the captions of shards have no column {shown(languages.column)}; name the one language that they are "
                "in, or give a table of captions"
            )
        own_language = languages.language if captions is None else None
        source = TarShards(
            shards, caption_field=caption_column, label_field=field, language=own_language, storage=storage
        )
    if source is not None and not isinstance(source, ImageFolder):
        return Recaptioned(source, tables, strict) if tables else source
    if source is not None and not tables:
        return source
    folder = Path(images) if source is None else source.root
    if not tables:
        return _plain_folder(folder, columns, by_folder, strict)
    if len(tables) == 1 and tables[0][0].holds_images(image_column):
        return _table_images(*tables[0], folder)
    return _folder_of(folder, tables, by_folder, strict)


def open_labelled(
    images: str | Path,
    labels: str | Path | None = None,
    *,
    image_column: str = "image",
    label_column: str = "label",
    storage: ShardStorage | None = None,
) -> SampleSource:
    """Images of which each has one class: from a table, or named by the folder that it lies in without one.

    Raises:
        FileNotFoundError: a folder, the table, or an image that it names does not exist.
        ValueError: no images, or an image that has no class or several labels.
    """
    columns = TableColumns(image_column, "caption", label_column)
    by_folder = (
        labels is None
        and not _tables_of_images(images)
        and not _shards_of(images)
        and not any(own.label for _, own in _metadata_of(Path(images), columns))
    )
    source = open_source(
        images,
        labels=FOLDERS if by_folder else labels,
        image_column=image_column,
        label_column=label_column,
        storage=storage,
    )
    where = shown(str(labels or images))
    for index in range(len(source)):
        target = source.target(index)
        if isinstance(target, str):
            continue
        key = shown(source.key(index))
        if target is None and by_folder:
            raise ValueError(
                f"the image {key} lies in {where} itself, not in a sub-folder named after its class; "
                "move it there, or give a table of labels"
            )
        found = "no label" if target is None else f"{len(target)} labels ({brief(', '.join(target), 60)})"
        raise ValueError(f"the image {key} has {found} in {where}; give each image one")
    return source


def _given_tables(
    captions: str | Path | None, labels: str | Path | None, columns: TableColumns
) -> list[tuple[Table, TableColumns]]:
    """The tables of captions and of labels, which may be one, with the columns that are read of each."""
    if captions is not None and captions == labels:
        return [(Table(captions), columns)]
    tables = [] if captions is None else [(Table(captions), columns._replace(label=None))]
    return tables if labels is None else [*tables, (Table(labels), columns._replace(caption=None))]


def _tables_of_images(images: str | Path) -> list[str | Path]:
    """The tables that stand for images: one, or those that a pattern matches."""
    if is_remote(images):
        return []
    if not is_table(images) or Path(images).is_dir():
        return []
    if not split_of(images)[0].exists() and (found := sorted(glob.glob(str(images)))):
        return [*found]
    return [images]


def parquet_of_images(folder: Path, image_column: str, unusable: list[ValueError] | None = None) -> list[Table]:
    """The Parquet files below a folder that hold images, as data sets on Hugging Face are stored; sorted.

    Hidden ones are left out. unusable: takes the errors of files that cannot be read; without it they are raised.
    """
    found: list[Table] = []
    for path in sorted(folder.rglob("*.parquet")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            table = Table(path)
            found += [table] if table.holds_images(image_column) else []
        except ValueError as error:
            if unusable is None:
                raise
            unusable.append(error)
    return found


def _joined(sources: list[SampleSource]) -> SampleSource:
    if len(sources) == 1:
        return sources[0]
    joined, firsts = JoinedSource(sources), np.cumsum([0, *map(len, sources)])
    starts = [source.block_starts for source in sources]
    if all(own is not None for own in starts):
        joined.block_starts = np.concatenate([own + first for own, first in zip(starts, firsts, strict=False)])
    return joined


def _of_table(table: Table, columns: TableColumns, strict: bool) -> SampleSource:
    """The images that a table holds, or names relative to its own folder, with the captions and labels that it has."""
    columns = table.present(columns)
    if table.holds_images(columns.image or ""):
        return _table_images(table, columns)
    return _folder_of(table.path.parent, [(table, columns)], False, strict)


def _table_images(table: Table, columns: TableColumns, folder: Path | None = None) -> SampleSource:
    """The rows of a table that holds images, those of other languages left out."""
    source = TableImages(table, columns, folder)
    foreign = source.foreign_rows
    return Subset(source, [row for row in range(len(source)) if row not in foreign]) if foreign else source


def _shards_of(images: str | Path, has_tables: bool = False) -> list[str]:
    """Finds the shards that `images` names; none if it is a folder of images."""
    if is_remote(images) or is_shard_name(images):
        return find_shards(str(images))
    if Path(images).is_dir():
        shards = _shards_in(Path(images))
        return [] if shards and has_tables and _has_images(Path(images)) else shards
    if Path(images).is_file():
        raise ValueError(f"{shown(str(images))} is neither a folder of images nor a table or a .tar shard")
    raise FileNotFoundError(f"there is no folder of images {shown(str(images))}")


def _has_images(folder: Path) -> bool:
    with contextlib.suppress(ValueError):
        return bool(list_images(folder))
    return False


def _metadata_of(folder: Path, columns: TableColumns) -> list[tuple[Table, TableColumns]]:
    """Finds Hugging Face's table of a folder of images, if it has one with captions or labels."""
    for path in (folder / name for name in _METADATA_FILES):
        table = Table(path) if path.is_file() else None
        if table is not None and "file_name" in table.columns:
            caption = next((name for name in (columns.caption, "caption") if name and table.has(name)), None)
            label = columns.label if columns.label and table.has(columns.label) else None
            if caption or label:
                return [(table, TableColumns("file_name", caption, label, columns.languages))]
    return []


def _plain_folder(folder: Path, columns: TableColumns, by_folder: bool, strict: bool) -> SampleSource:
    """A folder of images with what is known of them there: its metadata, its folders' names, texts beside images."""
    if not by_folder and (metadata := _metadata_of(folder, columns)):
        return _folder_of(folder, metadata, by_folder, strict)
    try:
        keys = list_images(folder)
    except ValueError:
        if tables := parquet_of_images(folder, columns.image or ""):
            return _joined([_of_table(table, columns, strict) for table in tables])
        raise
    if by_folder and not any(map(class_folder, keys)):
        raise ValueError(f"no image of {shown(str(folder))} lies in a sub-folder named after its class")
    captions, blank = read_sidecars(folder, keys)
    captions = {key: tuple(in_language(own, columns.languages.language)) for key, own in captions.items()}
    return ImageFolder(folder, keys, captions, FOLDERS if by_folder else None, blank_captions=blank)


def _folder_of(folder: Path, tables: list[tuple[Table, TableColumns]], by_folder: bool, strict: bool) -> ImageFolder:
    """Makes a source of the samples whose images exist. Raises ValueError for a table without captions and labels."""
    whole = SampleTable()
    for table, columns in tables:
        found = read_table(table, columns, images_root=folder)
        wanted = "captions" if columns.caption else "labels" if columns.label else ""
        wanted += f" in the language {shown(language, 40)}" if (language := columns.languages.language) else ""
        if wanted and not found.targets and not any(found.captions.values()) and (strict or not found.captions):
            raise ValueError(f"the table {shown(str(table.path), 100)} holds no {wanted}")
        whole.join(found)
    files = {key: whole.images.get(key, (key,)) for key in whole.captions}
    missing = [name for names in files.values() for name in names if name in whole.missing]
    if missing and strict:
        named = brief(" and ".join(shown(str(table.path), 60) for table, _ in tables), 100)
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} images that {named} names are not in {shown(str(folder), 60)}: "
            f"{brief(', '.join(missing[:3]), 60)}{', ...' if len(missing) > 3 else ''}; remove their rows or add the "
            "images"
        )
    return ImageFolder(
        folder,
        [key for key, names in files.items() if whole.missing.keys().isdisjoint(names)],
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
        ValueError: a wildcard or folder on a web server; an image or a table there.
    """
    if os.path.exists(pattern):
        found = _shards_in(Path(pattern)) if os.path.isdir(pattern) else [pattern]
        if not found:
            raise FileNotFoundError(f"there are no tar shards in {pattern!r}")
        return found
    shards: list[str] = []
    for name in _expand_braces(pattern):
        if is_remote(name) and not is_shard_name(name):
            if is_table(name) or name.lower().endswith(tuple(IMAGE_SUFFIXES)):
                raise ValueError(download_first(name))
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
