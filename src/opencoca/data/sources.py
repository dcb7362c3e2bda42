"""Sources of samples: folders of images, a part of another source, and several sources joined."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from opencoca.data.images import read_image_file
from opencoca.data.source import Place, Sample, SampleSource, SourceView
from opencoca.data.targets import Target, class_folder


class ImageFolder(SampleSource):
    """Image files below one folder, with captions and targets by key: an image's path relative to the folder.

    A file that can't be read raises ImageError with the reason.

    Args:
        root: the folder.
        keys: of the samples, with `/` between folders.
        captions: captions by key; images that are absent from it have none.
        targets: targets by key; or `folders`: the folder that an image lies in names its class.
        images: paths of the images relative to the folder, by key, for samples that have several.
    """

    def __init__(
        self,
        root: str | Path,
        keys: Iterable[str],
        captions: Mapping[str, tuple[str, ...]] | None = None,
        targets: Mapping[str, Target] | Literal["folders"] | None = None,
        *,
        images: Mapping[str, tuple[str, ...]] | None = None,
        missing_images: Iterable[str] = (),
        blank_captions: Iterable[str] = (),
    ):
        self.root = Path(root)
        self._keys = tuple(keys)
        self._captions = captions or {}
        self._targets: Mapping[str, Target] | Literal["folders"] = targets or {}
        self._images = images or {}
        self.missing_images = tuple(missing_images)
        self.blank_captions = tuple(blank_captions)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def read(self, index: int, *, images: bool = True, texts: bool = True, target: bool = True) -> Sample:
        key, own = self._keys[index], None
        if target:
            own = class_folder(key) if self._targets == "folders" else self._targets.get(key)
        data = tuple(read_image_file(self.root / name) for name in self._files(index)) if images else ()
        return Sample(data, self._captions.get(key, ()), own)

    def place(self, index: int) -> Place:
        return Place(str(self.root / self._files(index)[0]), 0)

    def _files(self, index: int) -> tuple[str, ...]:
        key = self._keys[index]
        return self._images.get(key) or (key,)


class Subset(SourceView):
    """Some samples of another source, in the order given."""

    def __init__(self, source: SampleSource, indices: Sequence[int]):
        self.source = source
        self.indices = tuple(int(index) for index in indices)
        self.captions_in_memory, self.is_remote = source.captions_in_memory, source.is_remote
        self.lost = source.lost

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> tuple[SampleSource, int]:
        return self.source, self.indices[index]


class JoinedSource(SourceView):
    """Several sources, one after the other. Keys are the sources' own, and may repeat."""

    def __init__(self, sources: Sequence[SampleSource]):
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

    def locate(self, index: int) -> tuple[SampleSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no image {index} among {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self.sources[number], index - (self._ends[number - 1] if number else 0)
