"""What tells whether samples are still the ones that they were: how many there are, and a digest of them.

Pixels are not read. Of tables, names, captions and targets are digested; of tar shards, their names and the digests of
their headers that their indexes hold, so that billions of samples cost no more than opening them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from opencoca.data.labels import LabelSource
from opencoca.data.recaptioned import Recaptioned
from opencoca.data.source import SampleSource
from opencoca.data.sources import JoinedSource, Subset
from opencoca.data.tar_source import TarShards


class DataIdentity(NamedTuple):
    """The number of samples of a source, and a digest of what names, describes and orders them."""

    samples: int
    digest: str


def data_identity(source: SampleSource) -> DataIdentity:
    """The identity of a source's samples; it does not depend on the folder that they lie in."""
    digest = hashlib.sha256()
    for line in _lines(source):
        digest.update(line.encode("utf-8", "surrogatepass"))
    return DataIdentity(len(source), digest.hexdigest()[:32])


def _lines(source: SampleSource) -> Iterator[str]:
    yield f"{len(source)}\n"
    if isinstance(source, JoinedSource):
        for part in source.sources:
            yield from _lines(part)
    elif isinstance(source, LabelSource | Subset | Recaptioned):
        yield from _lines(source.source)
        if not isinstance(source, LabelSource):
            for index in range(len(source)):
                tables_say = source.replaced(index) if isinstance(source, Recaptioned) else ()
                yield repr((int(source.indices[index]), tables_say))
    elif isinstance(source, TarShards):
        for path, end, headers in zip(source.shards, source.starts[1:].tolist(), source.digests, strict=True):
            yield f"{os.path.basename(path)}\0{end}\0{headers}\n"
    else:
        for index in range(len(source)):
            yield _described(source, index)


def _described(source: SampleSource, index: int) -> str:
    """A sample's name, with its texts and target where they are at hand."""
    texts, target = (), None
    if source.captions_in_memory:
        with contextlib.suppress(OSError, ValueError):  # it is reported where it is used
            _, texts, target = source.read(index, images=False)
    return repr((source.key(index), tuple(texts), target))
