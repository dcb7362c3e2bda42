"""The identity of samples changes with what a run would see of them, and with nothing else."""

import csv
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from opencoca.data import ImageFolder, LabelSource, MixedSource, SampleSource, Subset, TarShards, open_source
from opencoca.data.identity import data_identity

ROWS = (("a.png", "one dog"), ("b.png", "two dogs"), ("b.png", "a pair"))


def folder_of(folder: Path, rows: Sequence[tuple[str, str]]) -> SampleSource:
    folder.mkdir(parents=True)
    for name in {name for name, _ in rows}:
        Image.new("RGB", (8, 8)).save(folder / name)
    with open(folder / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return open_source(folder, folder / "t.csv")


def shard_of(path: Path, captions: Sequence[str]) -> TarShards:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions):
            image = io.BytesIO()
            Image.new("RGB", (8, 8)).save(image, "png")
            for suffix, content in (("png", image.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:03}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return TarShards([path])


def test_tables(tmp_path: Path) -> None:
    identity = data_identity(folder_of(tmp_path / "here", ROWS))
    assert identity.samples == 2
    assert data_identity(folder_of(tmp_path / "moved", ROWS)) == identity
    others = (
        ROWS[:2],
        (ROWS[0], ROWS[2], ROWS[1]),
        (("a.png", "one cat"), *ROWS[1:]),
        (("c.png", "one dog"), *ROWS[1:]),
        (*ROWS, ("c.png", "three")),
    )
    found = {data_identity(folder_of(tmp_path / f"other{n}", rows)) for n, rows in enumerate(others)}
    assert len(found | {identity}) == 6


def test_targets(tmp_path: Path) -> None:
    keys = ["a.png", "b.png"]
    first, second = (ImageFolder(tmp_path, keys, targets={"a.png": "dog", "b.png": name}) for name in ("cat", "cow"))
    assert data_identity(first) != data_identity(second)
    assert data_identity(LabelSource(first)) != data_identity(LabelSource(second))


def test_shards_by_their_headers(tmp_path: Path) -> None:
    identity = data_identity(shard_of(tmp_path / "a" / "000.tar", ["one", "two"]))
    assert identity.samples == 2
    assert data_identity(shard_of(tmp_path / "b" / "000.tar", ["one", "two"])) == identity
    longer = data_identity(shard_of(tmp_path / "c" / "000.tar", ["one", "twenty"]))
    renamed = data_identity(shard_of(tmp_path / "d" / "001.tar", ["one", "two"]))
    assert len({identity, longer, renamed}) == 3


def test_tables_beside_shards(tmp_path: Path) -> None:
    """The shards' own samples count, and so does what tables say of them instead."""
    found = set()
    for number, (inside, column, said) in enumerate(
        [
            ("one", "caption", "a"),
            ("one", "caption", "b"),
            ("one", "label", "b"),
            ("one", "label", "c"),
            ("x1", "label", "c"),
        ]
    ):
        shard, table = tmp_path / str(number) / "000.tar", tmp_path / f"{number}.csv"
        shard_of(shard, [inside, "two"])
        table.write_text(f"image,{column}\n000,{said}\n001,{said}\n")
        captions, labels = (table, None) if column == "caption" else (None, table)
        source = open_source(shard, captions, labels)
        identity = data_identity(source)
        assert identity == data_identity(open_source(shard, captions, labels))
        found |= {identity, data_identity(Subset(source, [1]))}
    assert len(found) == 10


def test_a_mixture_is_its_parts_in_order(tmp_path: Path) -> None:
    first, second = folder_of(tmp_path / "first", ROWS), folder_of(tmp_path / "second", ROWS[:1])
    mixed, swapped = MixedSource([first, second], [1, 1]), MixedSource([second, first], [1, 1])
    assert data_identity(mixed).samples == 3
    assert data_identity(mixed) != data_identity(swapped)
