"""Makes damaged and strange tables out of good ones of all kinds, and tries to read them."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from opencoca.data.images import ImageError
from opencoca.data.opening import open_source

from .helpers import encode, gradient, write_images

NAMES = ["a.png", "b.png", "sub/c.png"]
TEXTS = ["two dogs", 'a "red" ball, on grass', "ein Häuschen"]
LONGEST_SENTENCE = 300


def good_tables(folder: Path) -> list[Path]:
    """Writes a table of each kind about the images of `write_images(folder, NAMES)`."""
    rows = [
        {"image": name, "caption": text, "label": i} for i, (name, text) in enumerate(zip(NAMES, TEXTS, strict=True))
    ]
    quoted = [[row["image"], '"' + row["caption"].replace('"', '""') + '"', str(row["label"])] for row in rows]
    data = [encode(gradient(seed=seed), "PNG") for seed in range(3)]
    images = [{"id": i, "file_name": row["image"]} for i, row in enumerate(rows)]
    notes = [{"image_id": i, "caption": row["caption"]} for i, row in enumerate(rows)]
    sentences = [{"filename": row["image"], "split": "val", "sentences": [{"raw": row["caption"]}]} for row in rows]
    texts = {
        "t.csv": "\n".join(",".join(row) for row in [["image", "caption", "label"], *quoted]),
        "t.tsv": "\n".join("\t".join(row) for row in [["image", "caption", "label"], *quoted]),
        "b.tsv": "image\tcaption\n" + "".join(f"{base64.b64encode(image).decode()}\tx\n" for image in data),
        "t.jsonl": "\n".join(map(json.dumps, rows)),
        "coco.json": json.dumps({"images": images, "annotations": notes}, indent=1),
        "karpathy.json": json.dumps({"images": sentences}, indent=1),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    cells = [{"bytes": image, "path": name} for image, name in zip(data, NAMES, strict=True)]
    pq.write_table(
        pa.table({"image": cells, "caption": [[text] for text in TEXTS]}), folder / "i.parquet", row_group_size=2
    )
    return [folder / name for name in (*texts, "t.parquet", "i.parquet")]


def bad_tables(folder: Path, count: int, seed: int = 0) -> Iterator[Path]:
    """Writes `count` tables, one at a time, each made from a good one by one to three changes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_images(folder, NAMES)
    good = good_tables(folder)
    for number in range(count):
        random_ = random.Random(f"{seed} {number}")
        original = good[number % len(good)]
        content = original.read_bytes()
        for _ in range(random_.randint(1, 3)):
            changes = _ANY if original.suffix == ".parquet" else _ANY + _TEXT
            content = random_.choice(changes)(content, random_)
        path = folder / f"bad{number}{original.suffix}"
        path.write_bytes(content)
        yield path
        path.unlink()


def refusal(path: Path) -> str | None:
    """Reads a table in every way; returns the sentence that refuses it, or None. Any other error is one of the code."""
    sentence = None
    for images, captions in ((path.parent, path), (path, None)):
        try:
            source = open_source(images, captions, strict=False)
        except ValueError as error:
            sentence = str(error)
            continue
        for index in range(min(len(source), 50)):
            try:
                source.read(index)
            except ImageError as error:
                sentence = str(error)
    return sentence


def faults(path: Path, sentence: str | None) -> list[str]:
    """What is wrong with a sentence that refuses a table."""
    if sentence is None:
        return []
    found = [] if len(sentence) <= LONGEST_SENTENCE else [f"{len(sentence)} characters"]
    found += [] if sentence.isprintable() else ["not printable"]
    return found + ([] if path.name in sentence else ["names no file"])


def _cut(content: bytes, random_: random.Random) -> bytes:
    return content[: random_.randrange(len(content) + 1)]


def _flip(content: bytes, random_: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random_.randint(1, 20) if content else 0):
        changed[random_.randrange(len(changed))] = random_.randrange(256)
    return bytes(changed)


def _insert(content: bytes, random_: random.Random) -> bytes:
    place = random_.randrange(len(content) + 1)
    piece = random_.choice(
        [
            b"\0",
            b"\xff\xfe",
            b"\x1b[31m",
            b"\r",
            b"\xe9",
            b"\n\n",
            b'"',
            b"'",
            b"x" * 200_000,
            b"[" * 50_000,
            b"9" * 5000,
        ]
    )
    return content[:place] + piece + content[place:]


def _move(content: bytes, random_: random.Random) -> bytes:
    first, second = sorted(random_.randrange(len(content) + 1) for _ in range(2))
    return content[second:] + content[first:second] + content[:first]


def _repeat(content: bytes, random_: random.Random) -> bytes:
    return content * random_.randint(2, 5)


def _replacing(old: str, *new: str) -> Callable[[bytes, random.Random], bytes]:
    return lambda content, random_: content.replace(old.encode(), random_.choice(new).encode())


def _encoded(content: bytes, random_: random.Random) -> bytes:
    encoding = random_.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp1252", "utf-7"])
    return content.decode("utf-8", "replace").encode(encoding, "replace")


_ANY = [_cut, _flip, _insert, _move, _repeat, lambda content, random_: b""]
_TEXT = [
    _encoded,
    _replacing("caption", "image", "text", "", "cap\u0000tion", "x" * 5000),
    _replacing("image", "caption", "file_name", "images", " "),
    _replacing(",", ";", "\t", ",,", "|"),
    _replacing('"', "", "'", '""', "{"),
    _replacing("a.png", "../a.png", "/etc/passwd", "", "null", "['a.png', 'b.png']", "\u202e" * 300, "a" * 5000),
    _replacing("two dogs", "[1, 2]", '["x"', "['x']", "NaN", '{"a": 1}', "[" * 9000),
    _replacing("0", "-1", "1e999", "null", "[0]", '"0"'),
    _replacing("\n", "\r\n", "\r", "", "\n\n", "\u2028"),
]
