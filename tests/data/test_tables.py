"""Tables as people have them: other separators, encodings, columns, cells and names; each mistake is one sentence."""

import json
import os
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoca.data import open_source, read_table
from opencoca.data.tables import Table, TableColumns

from .helpers import write_images


def captions(path, **options):
    return dict(read_table(path, **options).captions)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("semicolons.csv", "image;caption\na.png;red, green\n"),
        ("tabs.csv", "filepath\ttitle\na.png\tred, green\n"),
        ("bars.csv", "image|caption\na.png|red, green\n"),
        ("commas.tsv", 'image,caption\na.png,"red, green"\n'),
        ("excel.csv", "sep=;\nimage;caption\na.png;red, green\n"),
        ("utf16.csv", "image\tcaption\r\na.png\tred, green\r\n".encode("utf-16")),
        ("utf16.jsonl", '{"image": "a.png", "caption": "red, green"}\n'.encode("utf-16-le")),
        ("mark.jsonl", b'\xef\xbb\xbf{"image": "a.png", "caption": "red, green"}\n'),
        ("facebook.jsonl", '{"file_name": "a.png", "text": "red, green"}\n'),
        ("capitals.csv", 'Image,Caption\na.png,"red, green"\n'),
        ("rows.json", json.dumps([{"image": "a.png", "caption": "red, green"}], indent=1)),
        ("lines.json", '{"image": "a.png", "caption": "red, green"}\n{"image": "a.png", "caption": null}\n'),
    ],
)
def test_forms_of_one_row(tmp_path, name, content):
    assert captions(write(tmp_path / name, content)) == {"a.png": ("red, green",)}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", "image,caption\na.png,\"['red square', 'it\"\"s']\"\n", ("red square", 'it"s')),
        ("numpy.csv", 'image,caption\na.png,"[\'red\' ""it\'s""\n \'green\']"\n', ("red", "it's", "green")),
        ("no_list.csv", "image,caption\na.png,['tis the season]\n", ("['tis the season]",)),
        (
            "both.jsonl",
            '{"image": "a.png", "captions": ["1", "2"]}\n{"image": "a.png", "caption": "3"}',
            ("1", "2", "3"),
        ),
        ("nested.jsonl", '{"image": "a.png", "caption": [{"raw": "1"}, {"text": "2"}]}', ("1", "2")),
        ("quote.tsv", 'image\tcaption\na.png\t"cat" says hello\na.png\t"2 ""b"""\n', ('"cat" says hello', '2 "b"')),
        ("open.tsv", 'image\tcaption\na.png\t"an open quote\na.png\tmore"\n', ('"an open quote', 'more"')),
    ],
)
def test_cells(tmp_path, name, content, expected):
    assert captions(write(tmp_path / name, content)) == {"a.png": expected}


def test_parquet_of_bytes_structs_and_categories(tmp_path):
    pq.write_table(pa.table({"image": [b"a.png"], "caption": ["\ufeffa square".encode()]}), tmp_path / "t.parquet")
    assert [row.captions for row in Table(tmp_path / "t.parquet").rows(TableColumns(None))] == [["a square"]]
    kinds = {
        "image": [{"path": "a.png"}, {"path": "b.png"}],
        "caption": [[{"raw": "one", "id": 1}], [{"raw": "two", "id": 2}]],
        "label": pa.array(["x", "y"]).dictionary_encode(),
    }
    pq.write_table(pa.table(kinds), tmp_path / "s.parquet")
    found = read_table(tmp_path / "s.parquet", TableColumns(label="label"))
    assert found.captions == {"a.png": ("one",), "b.png": ("two",)}
    assert found.targets == {"a.png": "x", "b.png": "y"}


def test_annotations_of_coco_and_karpathy(tmp_path):
    coco = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
        "annotations": [
            {"image_id": 8, "id": 1, "caption": "two "},
            {"image_id": 7, "id": 2, "caption": "one"},
            {"image_id": 8, "id": 3, "caption": "more"},
        ],
    }
    assert captions(write(tmp_path / "c.json", json.dumps(coco))) == {"b.png": ("two", "more"), "a.png": ("one",)}
    boxes = {
        "images": coco["images"],
        "annotations": [{"image_id": 7, "category_id": 3}],
        "categories": [{"id": 3, "name": "dog"}],
    }
    assert read_table(
        write(tmp_path / "i.json", json.dumps(boxes)), TableColumns(caption=None, label="label")
    ).targets == {"a.png": "dog"}
    karpathy = {
        "images": [
            {"filepath": "val", "filename": "a.png", "split": "val", "sentences": [{"raw": "one"}, {"raw": "two"}]},
            {"filename": "b.png", "split": "restval", "sentences": [{"raw": "three"}]},
            {"filename": "c.png", "split": "test", "sentences": [{"raw": "four"}]},
        ]
    }
    path = write(tmp_path / "k.json", json.dumps(karpathy))
    assert captions(f"{path}#val+restval") == {"val/a.png": ("one", "two"), "b.png": ("three",)}
    assert len(captions(path)) == 3


def test_names_in_another_unicode_form(tmp_path):
    stored = unicodedata.normalize("NFD", "Übung/café.png")
    write_images(tmp_path / "i", [stored, "b.png"])
    table = write(tmp_path / "t.csv", f"image,caption\n{unicodedata.normalize('NFC', stored)},1\n{stored},2\nb.png,3\n")
    source = open_source(tmp_path / "i", table)
    assert {source.key(i): source.captions(i) for i in range(2)} == {stored: ("1", "2"), "b.png": ("3",)}


def test_backslashes_between_folders(tmp_path):
    write_images(tmp_path, ["sub/a.png"])
    assert open_source(tmp_path, write(tmp_path / "t.csv", "image,caption\nsub\\a.png,x\n")).key(0) == "sub/a.png"


def test_absolute_names_through_links(tmp_path):
    write_images(tmp_path / "disk", ["a.png"])
    (tmp_path / "data").symlink_to("disk")
    for named, opened in (("disk", "data"), ("data", "disk")):
        table = write(tmp_path / "t.csv", f"image,caption\n{tmp_path / named}/a.png,a square\n")
        source = open_source(tmp_path / opened, table)
        assert (source.key(0), source.captions(0)) == ("a.png", ("a square",))


def test_names_relative_to_the_table_or_to_where_it_was_written(tmp_path):
    write_images(tmp_path / "photos", ["a.png", "b.png"])
    (tmp_path / "out").mkdir()
    table = write(tmp_path / "out" / "t.csv", "image,caption\nphotos/a.png,1\n../photos/b.png,2\n")
    with pytest.raises(FileNotFoundError, match="1 of the 2 images"):
        open_source(tmp_path / "photos", table)
    write(tmp_path / "out" / "t.csv.run.json", json.dumps({"roots": ["/nowhere", ".."]}))
    source = open_source(tmp_path / "photos", table)
    assert {source.key(i): source.captions(i) for i in range(2)} == {"a.png": ("1",), "b.png": ("2",)}
    os.rename(tmp_path / "photos", tmp_path / "others")
    with pytest.raises(FileNotFoundError, match="2 of the 2 images"):
        open_source(tmp_path / "others", write(tmp_path / "t.csv", "image,caption\nphotos/a.png,1\nphotos/b.png,2\n"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "image,caption,caption\na.png,1,2\n", r"t\.csv' has 2 columns 'caption'; rename"),
        ("t.csv", b"image,caption\na.png,x\na.png,caf\xe9\n", r"not UTF-8 text \(line 3 has the byte 0xe9\); save it"),
        ("t.csv", 'image,caption\na.png,x\na.png,"x" y\n', r"the row at line 3 of .* a quotation mark"),
        ("t.jsonl", '{"image": "a.png", "image": "b.png"}', r"line 1 of .* has an object with the key 'image' twice"),
        (
            "t.jsonl",
            '\n{"image": "a.png", "caption": [{"a": 1, "x}\\"": 2, "x}\\"": 3}]}',
            r"line 2 of .* twice; rename",
        ),
        (
            "t.json",
            '[{"image": "a.png"},\n{"image": "}",\n"caption": "x",\n"caption": "y"}]',
            r"line 4 of .* 'caption'",
        ),
        ("t.json", '{"images": [{"id": 1, "file_name": "a.png"},\n{"id": 1, "id": 2}]}', r"line 2 of .* the key 'id'"),
        ("t.jsonl", "[" * 50_000, r"line 1 of .* nested too deeply"),
        ("t.json", "[" * 50_000, r"t\.json' is JSON that is nested too deeply"),
        ("t.json", '{"images": [{"id": [1], "file_name": "x"}]}', "neither a list of objects nor annotations"),
        ("t.json", '{"images": [], "annotations": [{"image_id": 3}]}', "KeyError: 3"),
        ("t.jsonl", '{"image": "a.png", "caption": 5}', r"line 1 of .* not text but int \(5\)"),
        ("t.jsonl", json.dumps({"image": "a.png", "caption": [["x" * 9000] * 9]}), "not text but list"),
        ("t.jsonl", json.dumps({"image": "../" + "x" * 9000, "caption": "x"}), "outside of the images folder"),
        ("t.jsonl", json.dumps({"image": "\x1b[31m" + "a" * 9000, "caption": "x"}), r"1 of the 1 images .*\\x1b\[31m"),
        ("t.csv", ",".join(f"column {i}" for i in range(9000)), "has no column 'image'"),
        ("t.csv", f'{"x" * 9000},caption\n"a', "a quotation mark"),
    ],
)
def test_mistakes_are_one_short_sentence(tmp_path, name, content, message):
    write_images(tmp_path, ["a.png"])
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_source(tmp_path, write(tmp_path / name, content))
    assert name in str(caught.value)
    assert len(str(caught.value)) <= 300
    assert str(caught.value).isprintable()


def test_a_nul_in_a_name_costs_that_image_alone(tmp_path):
    write_images(tmp_path, ["a.png"])
    rows = [{"image": "a.png", "caption": "x"}, {"image": "a\0.png", "caption": "y"}]
    source = open_source(tmp_path, write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows))), strict=False)
    assert (source.key(0), len(source), source.missing_images) == ("a.png", 1, ("a\0.png",))


def test_parquet_that_would_fill_the_memory(tmp_path):
    pq.write_table(pa.table({"caption": [b"\0" * (80 << 20)]}), tmp_path / "t.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"t\.parquet': [\d,]+ bytes in its row group 0 would become 8\d,\d{3},\d{3};"):
        list(Table(tmp_path / "t.parquet").rows(TableColumns(None)))
