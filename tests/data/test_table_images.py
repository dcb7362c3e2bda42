"""Tables of images, texts beside images, and captions of shards in tables: sources like any other."""

import base64
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoca.data import (
    ImageError,
    ImageFolder,
    Subset,
    TableImages,
    check_source,
    decode_image,
    open_labelled,
    open_source,
    pack_shards,
)
from opencoca.recaption.inputs import LeftOut, open_inputs

from .helpers import encode, gradient, write_images
from .test_sources import write_table

IMAGES = [encode(gradient(seed=seed), "PNG") for seed in range(5)]


def write_parquet(path, **columns):
    cells = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(IMAGES)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": cells, **columns}), path, row_group_size=2)
    return path


def contents(source):
    return [(source.open_bytes(i), source.captions(i), source.target(i)) for i in range(len(source))]


def test_parquet_of_images_with_captions_and_labels(tmp_path):
    texts, labels = [[f"caption {i}", ""] for i in range(5)], [0, 1, 0, 1, 0]
    path = write_parquet(tmp_path / "data" / "train.parquet", caption=texts, label=labels)
    expected = [(IMAGES[i], (f"caption {i}",), str(labels[i])) for i in range(5)]
    for images, table in ((path, None), (tmp_path, None), (f"{tmp_path}/*/*.parquet", None)):
        source = open_source(images, table)
        assert contents(source) == expected
        assert source.key(3) == f"{path}#3"
        assert len(source.blank_captions) == 5
    assert contents(open_source(tmp_path, path)) == [(*row[:2], None) for row in expected]
    assert contents(pickle.loads(pickle.dumps(open_source(path)))) == expected
    assert np.array_equal(open_source(path).block_starts, [0, 2, 4])
    assert [open_labelled(images).target(1) for images in (path, tmp_path)] == ["1", "1"]
    report = check_source(open_source(path), progress=False)
    assert (report.num_images, report.num_captions, report.num_targets, report.formats) == (5, 5, 5, {"PNG": 5})


def test_a_damaged_file_among_parquet_of_images_is_told(tmp_path):
    """Training refuses the folder and names the file; captions are written for the rest, and the file is named."""
    write_parquet(tmp_path / "first.parquet", caption=[f"caption {i}" for i in range(5)])
    (tmp_path / "second.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"second\.parquet"):
        open_source(tmp_path)
    with pytest.warns(LeftOut, match=r"second\.parquet"):
        found = open_inputs([str(tmp_path)])
    assert len(found) == 5


def test_packed_and_read_again(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", caption=[f"caption {i}" for i in range(5)])
    pack_shards(open_source(path), tmp_path / "shards", progress=False)
    assert contents(open_source(tmp_path / "shards")) == contents(open_source(path))


def test_cells_with_a_path_or_nothing(tmp_path):
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}, {"bytes": IMAGES[1], "path": "a.png"}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    write_images(tmp_path, ["a.png"])
    source = open_source(tmp_path / "t.parquet")
    assert [source.open_bytes(0), source.open_bytes(2)] == [(tmp_path / "a.png").read_bytes(), IMAGES[1]]
    with pytest.raises(ImageError, match=r"t\.parquet#1': the row holds no image"):
        source.open_bytes(1)


@pytest.mark.parametrize("name", ["t.tsv", "t.csv", "t.jsonl"])
def test_base64(tmp_path, name):
    first, second = (base64.b64encode(data).decode() for data in IMAGES[:2])
    cells = [first, f"data:image/png;base64,{second}", "iVBORw0KGgo" * 9, first[:77]]
    write_table(tmp_path / name, [(cell, "x") for cell in cells])
    source = open_source(tmp_path / name)
    assert isinstance(source, TableImages)
    assert [source.open_bytes(i) for i in range(2)] == IMAGES[:2]
    assert source.captions(1) == ("x",)
    with pytest.raises(ImageError, match=r"#2'"):
        decode_image(source.open_bytes(2), name=source.key(2))
    with pytest.raises(ImageError, match=r"#3': its base64 text cannot be decoded"):
        source.open_bytes(3)


def test_a_table_of_names_stands_for_its_images(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "t.csv").write_text("file_name,text,label\nb.png,one,dog\n")
    source = open_source(tmp_path / "t.csv")
    assert isinstance(source, ImageFolder)
    assert (source.key(0), source.captions(0), source.target(0), len(source)) == ("b.png", ("one",), "dog", 1)


def test_texts_beside_images(tmp_path):
    write_images(tmp_path, ["a.png", "sub/b.jpg", "sub/c.jpg", "d.png"])
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n two \n")
    (tmp_path / "sub" / "b.caption").write_text("three", encoding="utf-16")
    (tmp_path / "sub" / "c.txt").write_text(" \n")
    source = open_source(tmp_path)
    assert {source.key(i): source.captions(i) for i in range(len(source))} == {
        "a.png": ("one", "two"),
        "d.png": (),
        "sub/b.jpg": ("three",),
        "sub/c.jpg": (),
    }
    assert source.blank_captions == ("sub/c.jpg",)
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"captions in '.*d\.txt': it is not UTF-8 text"):
        open_source(tmp_path)


def test_captions_of_shards_and_tables_of_images_in_tables(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", caption=[f"old {i}" for i in range(5)], label=list("abcde"))
    pack_shards(open_source(path), tmp_path / "shards", samples_per_shard=3, progress=False)
    keys = [open_source(tmp_path / "shards").key(i) for i in range(5)]
    names = {path: "elsewhere/t.parquet#{}", tmp_path / "shards": "elsewhere/0000{}.tar/{}"}
    for images, name in names.items():
        rows = [(name.format(i) if images == path else name.format(i // 3, keys[i]), f"new {i}") for i in (4, 1)]
        table = tmp_path / "new.jsonl"
        table.write_text("\n".join(json.dumps({"image": image, "caption": text}) for image, text in rows))
        source = open_source(images, table)
        assert contents(source) == [
            (IMAGES[1], ("new 1",), "b"),
            (IMAGES[4], ("new 4",), "e"),
        ]
        with open(table, "a") as file:
            file.write('\n{"image": "other.png", "caption": "x"}')
        with pytest.raises(FileNotFoundError, match=r"1 of the 3 samples that '.*new\.jsonl' names .*'other\.png'"):
            open_source(images, table)
        assert open_source(images, table, strict=False).missing_images == ("other.png",)
        assert Subset(source, [1]).captions(0) == ("new 4",)
