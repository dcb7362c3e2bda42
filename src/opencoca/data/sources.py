"""Where images and their captions come from: one interface over folders, caption tables and tar shards."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from opencoca.data.images import IMAGE_SUFFIXES
from opencoca.data.shards import expand_shards, load_index, unique_keys
from opencoca.data.tables import read_caption_table


class ImageTextSource(ABC):
    """Images with any number of captions each, in a fixed order, with random access.

    Safe to read from several threads and processes at once.

    Attributes:
        missing_images: keys of images that were named but don't exist; they have no index.
        blank_captions: the key of an image once per blank caption it had; `captions` leaves blank ones out.
    """

    missing_images: tuple[str, ...] = ()
    blank_captions: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def key(self, index: int) -> str:
        """The unique name of an image: its path relative to the folder, or its key in the shards."""

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image, stripped, none of them blank; empty if it has none."""

    @abstractmethod
    def open_bytes(self, index: int) -> bytes:
        """The encoded bytes of an image. Raises OSError if they can't be read."""


class ImageFolder(ImageTextSource):
    """Image files below one folder, with captions by their relative path.

    Args:
        root: the folder.
        keys: paths of the images relative to it, with `/` between folders.
        captions: captions by key; images that are absent from it have none.
    """

    def __init__(
        self,
        root: str | Path,
        keys: Iterable[str],
        captions: dict[str, tuple[str, ...]] | None = None,
        *,
        missing_images: Iterable[str] = (),
        blank_captions: Iterable[str] = (),
    ):
        self.root = Path(root)
        self._keys = tuple(keys)
        self._captions = captions or {}
        self.missing_images = tuple(missing_images)
        self.blank_captions = tuple(blank_captions)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions.get(self._keys[index], ())

    def open_bytes(self, index: int) -> bytes:
        return (self.root / self._keys[index]).read_bytes()


class TarShards(ImageTextSource):
    """Samples of tar shards, in the order of the shards and of the samples in them.

    A shard that is damaged keeps the samples before the damage, and a warning names it. Samples without an image are
    listed in `missing_images`.

    Args:
        paths: the shards.
        caption_field: the field of a sample's json that holds its caption or captions.

    Raises:
        FileNotFoundError: a shard doesn't exist.
        ValueError: no shard holds a sample.
    """

    def __init__(self, paths: Sequence[str | Path], *, caption_field: str = "caption"):
        shards = [(Path(path), load_index(Path(path), caption_field)) for path in paths]
        for path, index in shards:
            if index.damage:
                kept = f"the {len(index.samples)} samples before that are used"
                warnings.warn(f"tar shard {str(path)!r}: {index.damage}; {kept}", stacklevel=2)
        self.paths = tuple(path for path, _ in shards)
        self._keys = tuple(unique_keys(shards))
        self._places = [(i, s.offset, s.size) for i, (_, index) in enumerate(shards) for s in index.samples]
        if not self._places:
            names = ", ".join(repr(str(path)) for path in self.paths[:3])
            raise ValueError(f"the {len(self.paths)} tar shards ({names}) hold no images")
        captions = [sample.captions for _, index in shards for sample in index.samples]
        self._captions = tuple(tuple(filter(None, own)) for own in captions)
        self.missing_images = tuple(key for _, index in shards for key in index.missing_images)
        self.blank_captions = tuple(
            key for key, own in zip(self._keys, captions, strict=True) for text in own if not text
        )

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def open_bytes(self, index: int) -> bytes:
        shard, offset, size = self._places[index]
        # A file of its own for every read: nothing is shared between threads, or with a forked worker.
        with open(self.paths[shard], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"the tar shard {str(self.paths[shard])!r} became shorter while it was in use")
        return data


class Subset(ImageTextSource):
    """Some images of another source, in the order given."""

    def __init__(self, source: ImageTextSource, indices: Sequence[int]):
        self.source = source
        self.indices = tuple(int(index) for index in indices)

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.source.key(self.indices[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(self.indices[index])

    def open_bytes(self, index: int) -> bytes:
        return self.source.open_bytes(self.indices[index])


def open_source(
    images: str | Path,
    captions: str | Path | None = None,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    strict: bool = True,
) -> ImageTextSource:
    """Open images, with their captions if there are any.

    Args:
        images: a folder of images, searched with its subfolders if no table names them; or tar shards: one `.tar`, a
            folder of them, or a pattern such as `shards/*.tar` or `shards/{00000..00099}.tar`.
        captions: a CSV, TSV, JSON lines or Parquet table for a folder of images; shards carry their own.
        image_column: the table's column of image names, relative to `images`.
        caption_column: the table's column of captions (for shards, the field of a sample's json).
        strict: whether images that the table names but that don't exist are an error; else they are listed in the
            source's `missing_images`.

    Raises:
        FileNotFoundError: a folder, table, shard, or image named by the table doesn't exist.
        ValueError: an empty folder, an unusable table, no captions at all in a table.
    """
    folder = Path(images)
    if folder.is_dir():
        shards = [] if captions is not None else sorted(path for path in folder.glob("*.tar") if path.is_file())
    elif str(images).endswith(".tar"):
        shards = expand_shards(str(images))
        if captions is not None:
            raise ValueError(f"tar shards carry their captions themselves; leave {str(captions)!r} out")
    elif folder.is_file():
        raise ValueError(f"{str(images)!r} is neither a folder of images nor a .tar shard")
    else:
        raise FileNotFoundError(f"there is no folder of images {str(images)!r}")

    if shards:
        return TarShards(shards, caption_field=caption_column)
    if captions is None:
        return ImageFolder(folder, list_images(folder))
    return _open_table(folder, Path(captions), image_column, caption_column, strict)


def _open_table(folder: Path, path: Path, image_column: str, caption_column: str, strict: bool) -> ImageFolder:
    table = read_caption_table(path, image_column=image_column, caption_column=caption_column, images_root=folder)
    missing = [key for key in table.captions if not (folder / key).is_file()]
    if missing and strict:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(table.captions)} images that {str(path)!r} names are not in {str(folder)!r}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; remove their rows or add the images"
        )
    absent = set(missing)
    keys = [key for key in table.captions if key not in absent]
    if not any(table.captions.values()) and (strict or not table.captions):
        raise ValueError(f"the caption table {str(path)!r} holds no captions")
    captions = {key: table.captions[key] for key in keys}
    return ImageFolder(folder, keys, captions, missing_images=missing, blank_captions=table.blank)


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
