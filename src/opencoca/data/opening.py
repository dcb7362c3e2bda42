"""From what users name (folders, tables, tar shards) to a source of samples."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from opencoca.data.images import IMAGE_SUFFIXES
from opencoca.data.remote import find_remote, is_remote
from opencoca.data.shards import expand_braces, expand_shards
from opencoca.data.source import SampleSource
from opencoca.data.sources import ImageFolder
from opencoca.data.tables import SampleTable, TableColumns, column_names, read_table
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
    shards = _shards_of(images, captions, labels)
    by_folder = labels == FOLDERS
    if shards:
        field = None if by_folder else label_column
        return TarShards(shards, caption_field=caption_column, label_field=field, storage=storage)
    columns = TableColumns(image_column, caption_column, label_column)
    folder, tables = Path(images), _tables_of(Path(images), captions, labels, columns)
    if not tables:
        keys = list_images(folder)
        if by_folder and not any(map(class_folder, keys)):
            raise ValueError(f"no image of {str(images)!r} lies in a sub-folder named after its class")
        return ImageFolder(folder, keys, targets=FOLDERS if by_folder else None)
    named = " and ".join(repr(str(path)) for path, _ in tables)
    return _folder_of(folder, _read_tables(folder, tables, strict), by_folder, strict, named)


def open_labelled(
    images: str | Path, labels: str | Path | None = None, *, image_column: str = "image", label_column: str = "label"
) -> SampleSource:
    """Images of which each has one class: from a table, or named by the folder that it lies in without one.

    Raises:
        FileNotFoundError: a folder, the table, or an image that it names does not exist.
        ValueError: no images, or an image that has no class or several labels.
    """
    chosen = labels
    if labels is None and not _shards_of(images, None, None):
        chosen = FOLDERS
    source = open_source(images, labels=chosen, image_column=image_column, label_column=label_column)
    for index in range(len(source)):
        target, key = source.target(index), source.key(index)
        if isinstance(target, str):
            continue
        if target is not None:
            found = f"{len(target)} labels ({', '.join(target)})"
            raise ValueError(f"the image {key!r} has {found} in {str(labels or images)!r}; give each image one")
        if chosen == FOLDERS:
            raise ValueError(
                f"the image {key!r} lies in {str(images)!r} itself, not in a sub-folder named after its class; "
                "move it there, or give a table of labels"
            )
        raise ValueError(f"the image {key!r} has no label in {str(labels or images)!r}; give each image one")
    return source


def _shards_of(images: str | Path, captions: str | Path | None, labels: str | Path | None) -> list[str] | list[Path]:
    """The shards that `images` names; none if it is a folder of images."""
    folder = Path(images)
    tables = [table for table in (captions, labels) if table is not None and table != FOLDERS]
    if not is_remote(images) and folder.is_dir():
        return [] if tables else sorted(path for path in folder.glob("*.tar") if path.is_file())
    if is_remote(images) or str(images).endswith(".tar"):
        shards = find_shards(str(images)) if is_remote(images) else expand_shards(str(images))
        if tables:
            raise ValueError(f"tar shards carry their captions and labels themselves; leave {str(tables[0])!r} out")
        return shards
    if folder.is_file():
        raise ValueError(f"{str(images)!r} is neither a folder of images nor a .tar shard")
    raise FileNotFoundError(f"there is no folder of images {str(images)!r}")


def _tables_of(
    folder: Path, captions: str | Path | None, labels: str | Path | None, columns: TableColumns
) -> list[tuple[Path, TableColumns]]:
    """Which tables to read, and what their columns are called."""
    if captions is None and labels is None:
        return _metadata_of(folder, columns)
    if captions is not None and captions == labels:
        return [(Path(captions), columns)]
    tables: list[tuple[Path, TableColumns]] = []
    if captions is not None:
        tables.append((Path(captions), columns._replace(label=None)))
    if labels is not None and labels != FOLDERS:
        tables.append((Path(labels), columns._replace(caption=None)))
    return tables


def _metadata_of(folder: Path, columns: TableColumns) -> list[tuple[Path, TableColumns]]:
    """Hugging Face's table of a folder of images, if it has one with a column that is of use."""
    for path in (folder / name for name in _METADATA_FILES):
        names = column_names(path) if path.is_file() else ()
        caption = next((name for name in (columns.caption, "text") if name in names), None)
        label = columns.label if columns.label in names else None
        if "file_name" in names and (caption or label):
            return [(path, TableColumns("file_name", caption, label))]
    return []


def _read_tables(folder: Path, tables: Sequence[tuple[Path, TableColumns]], strict: bool) -> SampleTable:
    """One table out of that of captions and that of labels. Raises ValueError for one that holds none."""
    captions: dict[str, tuple[str, ...]] = {}
    whole = SampleTable(captions, {}, {}, ())
    for path, columns in tables:
        table = read_table(path, columns, images_root=folder)
        if not table.targets and not any(table.captions.values()) and (strict or not table.captions):
            raise ValueError(f"the table {str(path)!r} holds no {'captions' if columns.caption else 'labels'}")
        for key, texts in table.captions.items():
            captions[key] = captions.get(key, ()) + texts
        whole = SampleTable(
            captions, whole.targets | table.targets, whole.images | table.images, whole.blank + table.blank
        )
    return whole


def _folder_of(folder: Path, table: SampleTable, by_folder: bool, strict: bool, named: str) -> ImageFolder:
    """The samples of a table whose images are there; named: what to call the table in messages."""
    files = {key: table.images.get(key, (key,)) for key in table.captions}
    missing = [name for names in files.values() for name in names if not (folder / name).is_file()]
    if missing and strict:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} images that {named} names are not in {str(folder)!r}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; remove their rows or add the images"
        )
    absent = set(missing)
    keys = [key for key, names in files.items() if absent.isdisjoint(names)]
    return ImageFolder(
        folder,
        keys,
        {key: table.captions[key] for key in keys},
        FOLDERS if by_folder else table.targets,
        images=table.images,
        missing_images=missing,
        blank_captions=table.blank,
    )


def find_shards(pattern: str) -> list[str]:
    """Paths or URLs of the shards that a pattern names, sorted within each of its braces.

    A pattern is a file, a folder of `.tar` files, or a name with `{00000..00099}`, `{a,b}` and `*`; web servers
    (http, https) list nothing, so there names must be spelled out, with braces.

    Raises:
        FileNotFoundError: nothing matches.
        ValueError: a wildcard or folder on a web server.
    """
    if not is_remote(pattern):
        if Path(pattern).is_dir():
            pattern = str(Path(glob.escape(pattern), "*.tar"))
        return list(map(str, expand_shards(pattern)))
    shards: list[str] = []
    for name in expand_braces(pattern):
        if not name.endswith(".tar"):
            name = f"{name.rstrip('/')}/*.tar"
        if not glob.has_magic(name):
            shards.append(name)
            continue
        if name.startswith(("http://", "https://")):
            example = f"{pattern.rpartition('/')[0]}/{{00000..00099}}.tar"
            raise ValueError(f"a web server lists no files, so {name!r} cannot be found; spell them out: {example!r}")
        found = find_remote(name)
        if not found:
            raise FileNotFoundError(f"there are no tar shards {name!r}")
        shards += found
    return shards


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
