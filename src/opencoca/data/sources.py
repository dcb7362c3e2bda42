"""Where images and their captions come from: one interface over folders, caption tables and tar shards."""

from __future__ import annotations

import bisect
import glob
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from opencoca.data.images import IMAGE_SUFFIXES
from opencoca.data.remote import find_remote, is_remote
from opencoca.data.shards import expand_braces, expand_shards
from opencoca.data.source import ImageTextSource, Place, Sample
from opencoca.data.tables import read_caption_table
from opencoca.data.tar_source import ShardStorage, TarShards


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

    def place(self, index: int) -> Place:
        return Place(str(self.root / self._keys[index]), 0)


class Subset(ImageTextSource):
    """Some images of another source, in the order given."""

    def __init__(self, source: ImageTextSource, indices: Sequence[int]):
        self.source = source
        self.indices = tuple(int(index) for index in indices)
        self.captions_in_memory, self.is_remote = source.captions_in_memory, source.is_remote

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.source.key(self.indices[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(self.indices[index])

    def open_bytes(self, index: int) -> bytes:
        return self.source.open_bytes(self.indices[index])

    def read(self, index: int) -> Sample:
        return self.source.read(self.indices[index])

    def read_captions(self, index: int) -> tuple[str, ...]:
        return self.source.read_captions(self.indices[index])

    def place(self, index: int) -> Place:
        return self.source.place(self.indices[index])

    def draw_texts(self, index: int, captions: Sequence[str], wanted: int, bits: np.random.PCG64) -> list[str] | None:
        return self.source.draw_texts(self.indices[index], captions, wanted, bits)


class JoinedSource(ImageTextSource):
    """Several sources, one after the other. Keys are the sources' own, and may repeat."""

    def __init__(self, sources: Sequence[ImageTextSource]):
        self.sources = tuple(sources)
        self._ends = tuple(itertools.accumulate(len(source) for source in sources))
        self.captions_in_memory = all(source.captions_in_memory for source in sources)
        self.is_remote = any(source.is_remote for source in sources)
        self.lost = tuple(lost for source in sources for lost in source.lost)

    @property
    def missing_images(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(key for source in self.sources for key in source.missing_images)

    @property
    def blank_captions(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(key for source in self.sources for key in source.blank_captions)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def key(self, index: int) -> str:
        source, inner = self.locate(index)
        return source.key(inner)

    def captions(self, index: int) -> tuple[str, ...]:
        source, inner = self.locate(index)
        return source.captions(inner)

    def open_bytes(self, index: int) -> bytes:
        source, inner = self.locate(index)
        return source.open_bytes(inner)

    def read(self, index: int) -> Sample:
        source, inner = self.locate(index)
        return source.read(inner)

    def read_captions(self, index: int) -> tuple[str, ...]:
        source, inner = self.locate(index)
        return source.read_captions(inner)

    def place(self, index: int) -> Place:
        source, inner = self.locate(index)
        return source.place(inner)

    def draw_texts(self, index: int, captions: Sequence[str], wanted: int, bits: np.random.PCG64) -> list[str] | None:
        source, inner = self.locate(index)
        return source.draw_texts(inner, captions, wanted, bits)

    def locate(self, index: int) -> tuple[ImageTextSource, int]:
        """The source that an image belongs to, and its index there. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no image {index} among {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self.sources[number], index - (self._ends[number - 1] if number else 0)


def open_source(
    images: str | Path,
    captions: str | Path | None = None,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    strict: bool = True,
    storage: ShardStorage | None = None,
) -> ImageTextSource:
    """Open images, with their captions if there are any.

    Args:
        images: a folder of images, searched with its subfolders if no table names them; or tar shards: one `.tar`, a
            folder of them, or a pattern such as `shards/*.tar` or `s3://bucket/{00000..00099}.tar`; see `find_shards`.
        captions: a CSV, TSV, JSON lines or Parquet table for a folder of images; shards carry their own.
        image_column: the table's column of image names, relative to `images`.
        caption_column: the table's column of captions (for shards, the field of a sample's json).
        strict: whether images that the table names but that don't exist are an error; else they are listed in the
            source's `missing_images`.
        storage: where the indexes of shards lie, and what is kept of remote ones.

    Raises:
        FileNotFoundError: a folder, table, shard, or image named by the table doesn't exist.
        ValueError: an empty folder, an unusable table, no captions at all in a table.
    """
    folder = Path(images)
    if is_remote(images):
        shards = find_shards(str(images))
        if captions is not None:
            raise ValueError(f"tar shards carry their captions themselves; leave {str(captions)!r} out")
    elif folder.is_dir():
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
        return TarShards(shards, caption_field=caption_column, storage=storage)
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
