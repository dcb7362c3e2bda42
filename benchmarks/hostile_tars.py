"""Tar shards as nobody should write them: links that lead nowhere, doubled keys, deep json, damage, false indexes."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import random
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import trials
from PIL import Image

from opencoca.data import TarShards, decode_image
from opencoca.data.shard_index import INDEX_SUFFIX

MAX_SECONDS, MAX_BYTES = 2.0, 0.5e9
_TEXTS = [b"a cat", b"\xef\xbb\xbfa cat", "Füchse".encode("cp1252"), "a".encode("utf-16"), b"", b"\0", b"x" * 5000]
_JSON = [
    b'{"caption": "a dog"}',
    b'{"caption": 3, "key": ["no", "text"]}',
    b"[" * 100_000,
    b'{"caption": "a", "key": "same"}',
    b"{",
    b"\xff\xfe\xff",
    b'{"captions": [null, {"a": 1}]}',
    b"1" * 9000,
]


def attempt(seed: int, first: int, count: int) -> list[trials.Trial]:
    """Reads all samples of the shards from number `first` on."""
    return [_read(seed, number) for number in range(first, first + count)]


def _read(seed: int, number: int) -> trials.Trial:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard.tar")
        name = malformed(path, seed, number)
        return trials.attempt(f"{number} {name}", lambda: _use(path), MAX_SECONDS, MAX_BYTES)


def _use(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they name what is lost
        source = TarShards([path])
    keys = [source.key(index) for index in range(len(source))]
    assert len(set(keys)) == len(keys), "two samples have one name"
    for index, key in enumerate(keys):
        with contextlib.suppress(ValueError, OSError):  # a bad sample, which says so
            decode_image(source.open_bytes(index), name=key)
        with contextlib.suppress(ValueError, OSError):
            source.read(index)


def malformed(path: Path, seed: int, number: int) -> str:
    """Writes one shard, and perhaps a false index beside it; returns what was done."""
    rng = random.Random(seed * 1_000_003 + number)
    data = bytearray(_shard(rng))
    change = rng.choice([_nothing, _damage_header, _overwrite, _truncate, _long_size, _drop_blocks])
    for _ in range(rng.choice([1, 3])):
        change(data, rng)
    pack = rng.choice([bytes, bytes, bytes, gzip.compress, bz2.compress, lzma.compress])
    packed = bytearray(pack(bytes(data)))
    if pack is not bytes and rng.random() < 0.5:
        _truncate(packed, rng)
    path.write_bytes(packed)
    done = f"{change.__name__.strip('_')}, {pack.__name__ if pack is not bytes else 'not'} compressed"
    if rng.random() < 0.3:
        _write_false_index(path, rng)
        done += ", false index"
    return done


def _shard(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    format = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for number in range(rng.choice([1, 3, 8])):
            keys = [f"{number:04d}", f"IMG_{number}.05.01", "same", "../up", f"new\nline{number}", f".{number}"]
            key = rng.choice(keys)
            if format != tarfile.USTAR_FORMAT and rng.random() < 0.2:
                key += "x" * 300
            for ending, content in ((".jpg", _photo(rng)), (".txt", rng.choice(_TEXTS)), (".json", rng.choice(_JSON))):
                if rng.random() < 0.8:
                    _add(archive, key + rng.choice([ending, ending.upper(), f".extra{ending}"]), content)
            _add_link(archive, key, rng)
    return buffer.getvalue()


def _photo(rng: random.Random) -> bytes:
    values = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG")
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _add_link(archive: tarfile.TarFile, key: str, rng: random.Random) -> None:
    """A link to a file, to itself, out of the shard, or to a link; or a device or folder of an image's name."""
    member = tarfile.TarInfo(f"{key}.link.jpg")
    kinds = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    member.type = rng.choice(kinds)
    member.linkname = rng.choice([f"{key}.jpg", member.name, "/etc/passwd", "../../other.jpg", "same.link.jpg", ""])
    archive.addfile(member)


def _nothing(data: bytearray, rng: random.Random) -> None:
    pass


def _damage_header(data: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(data) // 512) * 512 + rng.randrange(512) if len(data) >= 512 else 0
    data[place : place + 1] = rng.randbytes(1)


def _overwrite(data: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(data) + 1)
    data[place : place + 600] = rng.randbytes(600)


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _long_size(data: bytearray, rng: random.Random) -> None:
    """A header with a right checksum and a size of another world."""
    place = rng.randrange(max(1, len(data) // 512)) * 512
    header = data[place : place + 512]
    if len(header) < 512:
        return
    header[124:136] = rng.choice([b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"\xff" * 12, b"not a size\0\0"])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[place : place + 512] = header


def _drop_blocks(data: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(data) + 1)
    del data[place : place + 512 * rng.choice([1, 2])]


def _write_false_index(path: Path, rng: random.Random) -> None:
    """An index that fits the shard by its size and time, and speaks of other places, types and amounts."""
    status = path.stat()
    keys = rng.choice([["a"], [[]], ["a", "a"], [None], "text"])
    facts = {
        "version": rng.choice([2, 3, 4, 5]),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "etag": rng.choice(["", None, 3]),
        "digest": rng.choice(["", 5]),
        "lost": rng.choice([[], [["k", 2**70, "r"]], [[1, 2, 3]], [[]]]),
        "damage": rng.choice([[], [[0, "r"]], [["0", 1]], 7]),
        "keys": keys,
    }
    values = [0, 512, 2**62, -1, status.st_size - 1]
    shape = rng.choice([(1, 3, 2), (1, 4, 2), (2, 3, 2), (0, 3, 2), (1, 9), (1, 3, 2, 1)])
    numbers = np.array([rng.choice(values) for _ in range(int(np.prod(shape)))])
    members = numbers.reshape(shape).astype(rng.choice(["int64", "int64", "float64", "int8"]))
    text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    with open(f"{path}{INDEX_SUFFIX}", "wb") as file:
        np.savez_compressed(file, facts=text, members=members)
