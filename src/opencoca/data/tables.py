"""The one reader of tables: CSV, TSV, JSON lines, JSON and Parquet files that name images, captions and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from opencoca.data.cells import MIN_BASE64, image_cells, image_in, split_captions
from opencoca.data.languages import NO_LANGUAGES, CaptionLanguages, in_language
from opencoca.data.names import ImageKeys
from opencoca.data.parquet import ParquetRows
from opencoca.data.remote import is_remote
from opencoca.data.table_files import TextRows
from opencoca.data.targets import Target, parse_target, shares
from opencoca.system.messages import brief, shown
from opencoca.system.reading import download_first

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")

# A row may have the second of these where it hasn't the first.
_TOGETHER = {"image": ("image", "images"), "caption": ("captions", "caption"), "label": ("label", "labels")}
# What other tools call these columns, for tables that have none of the above.
_KNOWN = {
    "image": ("file_name", "filename", "filepath", "image_path", "image_file", "path", "jpg", "png"),
    "caption": ("text", "title"),
    "label": (),
    "language": ("lang",),
}


class TableColumns(NamedTuple):
    """The names of a table's columns, None for one that isn't read, and which languages its captions are in.

    Where a table has no `image`, `caption` or `label`, what else such a column is called is read: `images`,
    `file_name`, `filepath` and others; `captions`, `text`, `title`; `labels`.
    """

    image: str | None = "image"
    caption: str | None = "caption"
    label: str | None = None
    languages: CaptionLanguages = NO_LANGUAGES


DEFAULT_COLUMNS = TableColumns()


class TableRow(NamedTuple):
    """What a row says: where it stands, for messages; names of images; captions, "" for a blank one; a target.

    is_foreign: its captions, left out here, are in another language than those that are read.
    """

    where: str
    images: list[str]
    captions: list[str]
    target: Target | None
    is_foreign: bool = False


class Table:
    """A table of any kind: the names of its columns, and what its rows say of images.

    Args:
        path: the file; behind annotations with splits, `#` and the ones to read: `dataset_coco.json#train+restval`.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it is unreadable, or of an unknown format.
    """

    def __init__(self, path: str | Path):
        self.path, split = split_of(path)
        suffix, name = self.path.suffix.lower(), shown(str(path), 100)
        if not self.path.is_file():
            if is_remote(path):
                raise ValueError(download_first(path))
            raise FileNotFoundError(f"there is no table {name}")
        if suffix not in TABLE_SUFFIXES:
            known = ", ".join(TABLE_SUFFIXES[:-1]) + " or " + TABLE_SUFFIXES[-1]
            raise ValueError(f"cannot tell the format of the table {name}: expected {known}")
        try:
            self._content = ParquetRows(self.path) if suffix == ".parquet" else TextRows(self.path, split)
        except OSError as error:
            raise ValueError(f"cannot read the table {name}: {brief(error.strerror or error)}") from error
        self.columns = self._content.columns

    def rows(self, columns: TableColumns) -> Iterator[TableRow]:
        """Reads these columns of every row, once.

        Raises ValueError for a column that isn't there, and for a row that names no image, a caption that isn't text or
        a label that can't be used, or a language that isn't known.
        """
        image, caption, label = (self.columns_for(column) if column else () for column in columns[:3])
        languages = columns.languages
        spoken = self._language_columns(languages) if caption else ()
        file = shown(str(self.path), 100)
        for place, cells in self._content.rows([*image, *caption, *label, *spoken]):
            where = f"{place} of {file}"
            language = languages.of_row(_first(cells, spoken), where) if spoken else languages.language
            is_foreign = bool(spoken) and language is None
            captions = split_captions(_first(cells, caption), where, parse_json=True) if caption else []
            yield TableRow(
                where,
                _image_names(_first(cells, image), where) if image else [],
                [] if is_foreign else in_language(captions, language),
                parse_target(_first(cells, label), where, parse_json=True) if label else None,
                is_foreign,
            )

    def _language_columns(self, languages: CaptionLanguages) -> tuple[str, ...]:
        if languages.column is None or not (languages.column_must_be or self.has(languages.column)):
            return ()
        return self.columns_for(languages.column)

    def has(self, wanted: str) -> bool:
        """Tells whether there is such a column, under this or, for the usual ones, another usual name."""
        return bool(self._named(wanted))

    def _named(self, wanted: str) -> tuple[str, ...]:
        for names in (_TOGETHER.get(wanted, (wanted,)), *((name,) for name in _KNOWN.get(wanted, ()))):
            exact = tuple(name for name in names if name in self.columns)
            if found := exact or tuple(name for name in self.columns if name.lower() in names):
                return found
        return ()

    def present(self, columns: TableColumns) -> TableColumns:
        """These columns without `caption` and `label` where the table has none; other names must be there."""
        caption, label = columns.caption, columns.label
        return columns._replace(
            caption=None if caption == "caption" and not self.has(caption) else caption,
            label=None if label == "label" and not self.has(label) else label,
        )

    def columns_for(self, wanted: str) -> tuple[str, ...]:
        """The columns that are read for a wanted one. Raises ValueError if there is none, or several of one name."""
        found = self._named(wanted)
        for name in found:
            if (count := self.columns.count(name)) > 1:
                path = shown(str(self.path), 100)
                raise ValueError(f"the table {path} has {count} columns {shown(name)}; rename or remove all but one")
        if found:
            return found
        have = ", ".join(shown(name, 40) for name in self.columns[:20]) or "none"
        have = have if len(have) <= 100 else f"{have[:97]}..."
        raise ValueError(
            f"the table {shown(str(self.path), 140)} has no column {shown(wanted, 60)}; its columns are: {have}"
        )

    def holds_images(self, image_column: str) -> bool:
        """Tells whether the column of images holds them, as bytes or in base64, and not only their names."""
        return self.has(image_column) and self._content.holds_images(self.columns_for(image_column)[0])

    def image_cells(self, image_column: str) -> Sequence[Any]:
        """The cells of the column of images, in the order of the rows."""
        return self._content.cells(self.columns_for(image_column)[0])


def split_of(path: str | Path) -> tuple[Path, str]:
    """The file, and the splits behind `#` in its name, if there is no file of the whole name."""
    file, mark, split = str(path).rpartition("#")
    if mark and file.lower().endswith(".json") and not Path(path).is_file():
        return Path(file), split
    return Path(path), ""


def is_table(path: str | Path) -> bool:
    """Tells by its name whether a path is a table."""
    return split_of(path)[0].suffix.lower() in TABLE_SUFFIXES


@dataclass
class SampleTable:
    """The samples that tables describe, by key; `captions` has all of them, in the order of their first row.

    Attributes:
        captions: all captions of a sample, blank ones left out.
        targets: of the samples that have one.
        images: the names of the images, of the samples that have several.
        blank: the key of a sample once for each blank caption.
        missing: keys of images that don't exist.
    """

    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    images: dict[str, tuple[str, ...]] = field(default_factory=dict)
    blank: list[str] = field(default_factory=list)
    missing: dict[str, None] = field(default_factory=dict)

    def join(self, other: SampleTable) -> None:
        """Adds the samples of another table, and further captions and targets of the same samples."""
        for key, texts in other.captions.items():
            self.captions[key] = self.captions.get(key, ()) + texts
        self.targets |= other.targets
        self.images |= other.images
        self.blank += other.blank
        self.missing |= other.missing


def read_table(
    table: str | Path | Table, columns: TableColumns = DEFAULT_COLUMNS, *, images_root: str | Path = "."
) -> SampleTable:
    """Read a table whose rows hold an image's name with one caption or a list of captions, with a label, or with both.

    A list is a list in JSON and Parquet, and text that is one in JSON or Python in CSV. A row of several images is
    a sample of several, and its key is their names with ` + ` between them. Rows of the same images are joined in
    order of appearance, their labels as `parse_target` treats a list. Rows in other languages than are read are
    left out. Names become paths relative to `images_root`, with `/` between folders; see `ImageKeys` for what else
    they may be relative to.

    Raises:
        FileNotFoundError: no such table.
        ValueError: unreadable, of an unknown format, without the columns, or with a row that names no image, an image
            outside of `images_root`, a caption that isn't text, or a label that can't be used.
    """
    table = table if isinstance(table, Table) else Table(table)
    keys = ImageKeys(Path(images_root), table.path)
    found = SampleTable(missing=keys.missing)
    targets: dict[str, list[Target]] = {}
    classes: dict[str, str] = {}  # one string for each class, however many samples it has
    for where, images, texts, target, is_foreign in table.rows(columns):
        if is_foreign:
            continue
        names = tuple(keys.key(name, where) for name in images)
        key = " + ".join(names)
        if len(names) > 1:
            found.images[key] = names
        found.captions[key] = found.captions.get(key, ()) + tuple(filter(None, texts))
        found.blank += [key] * texts.count("")
        if target is not None:
            target = classes.setdefault(target, target) if isinstance(target, str) else target
            targets.setdefault(key, []).append(target)
    found.targets |= {key: join_targets(key, own, table.path) for key, own in targets.items()}
    return found


def join_targets(key: str, targets: list[Target], path: Path) -> Target:
    """One target out of those that the rows of a sample name. Raises ValueError if they can't be joined."""
    if all(target == targets[0] for target in targets):
        return targets[0]
    names = [target for target in targets if isinstance(target, str)]
    joined = shares(names) if len(names) == len(targets) else None
    if joined is None:
        rows = f"several rows of {shown(str(path), 100)}"
        raise ValueError(f"{rows} give {shown(key)} different answers; put them into one row")
    return joined


def _first(cells: dict[str, Any], names: Sequence[str]) -> Any:
    """The first of these cells that isn't blank, else the first."""
    first = cells.get(names[0])
    if len(names) == 1 or first not in (None, "", []):
        return first
    return next((cells[name] for name in names if cells.get(name) not in (None, "", [])), first)


def _image_names(value: Any, where: str) -> list[str]:
    if isinstance(value, str) and len(value) < MIN_BASE64 and value[:1] not in ("[", "{", " ", ""):
        return [value.rstrip()]
    names: list[str] = []
    for cell in image_cells(value):
        try:
            name = image_in(cell)
        except ValueError as error:
            raise ValueError(f"{where} holds an image in base64 where others have names, and {error}") from None
        if isinstance(name, bytes):
            raise ValueError(f"{where} holds an image and not the name of its file; give this table as the images")
        if not name:
            raise ValueError(f"{where} names no image")
        names.append(name)
    return names
