"""Tables of every kind that are damaged or strange: cut, flipped, nested, in other encodings, with other cells."""

from __future__ import annotations

import base64
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import trials
from PIL import Image

from opencoca.data.images import ImageError
from opencoca.data.opening import open_source

MAX_SECONDS, MAX_BYTES = 2.0, 0.5e9
NAMES = ["a.png", "b.png", "sub/c.png"]
TEXTS = ["two dogs", 'a "red" ball, on grass', "ein Häuschen"]


def good_tables(folder: Path) -> list[Path]:
    """Writes a table of each kind about the images NAMES."""
    rows = [
        {"image": name, "caption": text, "label": i} for i, (name, text) in enumerate(zip(NAMES, TEXTS, strict=True))
    ]
    quoted = [[row["image"], '"' + row["caption"].replace('"', '""') + '"', str(row["label"])] for row in rows]
    data = [_image(seed) for seed in range(3)]
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


def attempt(seed: int, first: int, count: int) -> list[trials.Trial]:
    """Reads the tables from number `first` on."""
    with tempfile.TemporaryDirectory() as folder:
        kinds = write_good(Path(folder))
        return [_read(kinds, seed, number) for number in range(first, first + count)]


def write_good(folder: Path) -> list[Path]:
    """Writes images, and a table of each kind that is sound."""
    for seed, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(_image(seed))
    return good_tables(folder)


def _read(kinds: list[Path], seed: int, number: int) -> trials.Trial:
    path, name = malformed(kinds, seed, number)
    try:
        trial = trials.attempt(f"{number} {name}", lambda: use(path), MAX_SECONDS, MAX_BYTES)
    finally:
        path.unlink()
    if trial.refusal and path.name not in trial.refusal:
        trial = trial._replace(fault=f"{trial.fault}; the sentence names no file: {trial.refusal!r}")
    return trial


def malformed(kinds: list[Path], seed: int, number: int) -> tuple[Path, str]:
    """Writes a table made from a good one by one to three changes; returns it and what it was made from."""
    rng = random.Random(seed * 1_000_003 + number)
    original = kinds[number % len(kinds)]
    content = original.read_bytes()
    for _ in range(rng.randint(1, 3)):
        content = rng.choice(_ANY if original.suffix == ".parquet" else _ANY + _TEXT)(content, rng)
    path = original.with_name(f"bad{number}{original.suffix}")
    path.write_bytes(content)
    return path, original.name


def use(path: Path) -> None:
    """Reads a table in every way; raises ValueError with the sentence that refuses it or one of its images."""
    refusals: list[ValueError] = []
    for images, captions in ((path.parent, path), (path, None)):
        try:
            source = open_source(images, captions, strict=False)
        except ValueError as error:
            refusals.append(error)
            continue
        for index in range(min(len(source), 50)):
            try:
                source.read(index)
            except ImageError as error:
                refusals.append(error)
    if refusals:
        raise refusals[-1]


def _image(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((24, 16), 10 + seed).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 20) if content else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _insert(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    piece = rng.choice(
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


def _move(content: bytes, rng: random.Random) -> bytes:
    first, second = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[second:] + content[first:second] + content[:first]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    return content * rng.randint(2, 5)


def _replacing(old: str, *new: str) -> Callable[[bytes, random.Random], bytes]:
    return lambda content, rng: content.replace(old.encode(), rng.choice(new).encode())


def _encoded(content: bytes, rng: random.Random) -> bytes:
    encoding = rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp1252", "utf-7"])
    return content.decode("utf-8", "replace").encode(encoding, "replace")


_ANY = [_cut, _flip, _insert, _move, _repeat, lambda content, rng: b""]
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
