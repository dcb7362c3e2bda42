import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoca.data import ImageError, ImageFolder, Subset, open_source, read_table

from .helpers import write_images

CAPTIONS = {"b.jpg": ("two dogs", "a brown dog, running"), "sub/a.png": ('a "red" ball',)}


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images", ["b.jpg", "sub/a.png", "z.jpg"])
    return tmp_path / "images"


def write_table(path, rows, columns=("image", "caption")):
    """Rows of (image, caption) in the format that the path's ending asks for."""
    dicts = [dict(zip(columns, row, strict=True)) for row in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(dicts), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in dicts) + "\n\n", encoding="utf-8")
    else:
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([columns, *[[json.dumps(c) if isinstance(c, list) else c for c in row] for row in rows]])
    return path


def contents(source):
    return {source.key(index): source.captions(index) for index in range(len(source))}


FORMATS = [".csv", ".tsv", ".jsonl", ".parquet"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_one_row_a_caption(folder, tmp_path, suffix):
    rows = [("b.jpg", "two dogs"), ("sub/a.png", 'a "red" ball'), ("./b.jpg", " a brown dog, running ")]
    source = open_source(folder, write_table(tmp_path / f"t{suffix}", rows))
    assert list(contents(source).items()) == list(CAPTIONS.items())
    assert source.open_bytes(0) == (folder / "b.jpg").read_bytes()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("column", ["caption", "captions"])
def test_a_list_of_captions_in_a_row(folder, tmp_path, suffix, column):
    rows = [(image, list(captions)) for image, captions in CAPTIONS.items()]
    source = open_source(folder, write_table(tmp_path / f"t{suffix}", rows, ("image", column)))
    assert contents(source) == CAPTIONS


def test_named_columns_absolute_paths_and_more_columns(folder, tmp_path):
    rows = [(str(folder / "b.jpg"), "two dogs", 7)]
    table = write_table(tmp_path / "t.parquet", rows, ("file", "text", "number"))
    assert contents(open_source(folder, table, image_column="file", caption_column="text")) == {"b.jpg": ("two dogs",)}


def test_byte_order_mark_and_unicode(folder, tmp_path):
    (tmp_path / "t.csv").write_bytes("﻿image,caption\nb.jpg,ein Häuschen 🐕\n".encode())
    assert contents(open_source(folder, tmp_path / "t.csv")) == {"b.jpg": ("ein Häuschen 🐕",)}


def test_a_caption_in_brackets_stays_a_caption(folder, tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\nb.jpg,[a dog]\n")
    assert contents(open_source(folder, tmp_path / "t.csv")) == {"b.jpg": ("[a dog]",)}


@pytest.mark.parametrize("suffix", FORMATS)
def test_blank_captions_are_counted_not_kept(folder, tmp_path, suffix):
    source = open_source(folder, write_table(tmp_path / f"t{suffix}", [("b.jpg", "  "), ("b.jpg", "x"), ("z.jpg", "")]))
    assert contents(source) == {"b.jpg": ("x",), "z.jpg": ()}
    assert source.blank_captions == ("b.jpg", "z.jpg")


def test_plain_folder_is_sorted_recursive_and_skips_the_rest(folder):
    for name in (".hidden.jpg", "notes.txt", "c.heic"):
        (folder / name).write_bytes(b"x")
    os.symlink(folder, folder / "sub" / "loop")
    source = open_source(folder)
    assert list(contents(source)) == ["b.jpg", "c.heic", "sub/a.png", "z.jpg"]
    assert contents(source)["b.jpg"] == ()


def test_subset(folder):
    source = Subset(open_source(folder), [2, 0])
    assert list(contents(source)) == ["z.jpg", "b.jpg"]
    assert source.open_bytes(1) == (folder / "b.jpg").read_bytes()


def test_missing_images(folder, tmp_path):
    rows = [(f"m{i}.jpg", "x") for i in range(5)] + [("b.jpg", "y")]
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(
        FileNotFoundError, match=r"5 of the 6 images .*: m0.jpg, m1.jpg, m2.jpg, \.\.\.; remove"
    ) as caught:
        open_source(folder, table)
    assert "m3.jpg" not in str(caught.value)
    source = open_source(folder, table, strict=False)
    assert contents(source) == {"b.jpg": ("y",)}
    assert source.missing_images == ("m0.jpg", "m1.jpg", "m2.jpg", "m3.jpg", "m4.jpg")


def test_missing_and_empty_folders(folder, tmp_path):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"the folder '.*empty' holds no images"):
        open_source(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"there is no folder of images '.*absent'"):
        open_source(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"there is no table '.*absent\.csv'"):
        open_source(folder, tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="neither a folder of images nor"):
        open_source(folder / "b.jpg")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_without_the_column_names_those_that_exist(folder, tmp_path, suffix):
    table = write_table(tmp_path / f"t{suffix}", [("b.jpg", "x")], ("file", "text"))
    with pytest.raises(ValueError, match=r"t\.\w+' has no column 'image'; its columns are: 'file', 'text'"):
        open_source(folder, table)
    with pytest.raises(ValueError, match="has no column 'words'"):
        open_source(folder, table, image_column="file", caption_column="words")


@pytest.mark.parametrize("name", ["../secret.jpg", "sub/../../secret.jpg", "/etc/passwd", ".."])
def test_paths_that_leave_the_folder(folder, tmp_path, name):
    table = write_table(tmp_path / "t.csv", [("b.jpg", "x"), (name, "x")])
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"line 3 of .* which is outside of the images folder"):
            open_source(folder, table, strict=strict)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", b"image,caption\n", "holds no captions"),
        ("t.csv", b"image,caption\nb.jpg,\n", "holds no captions"),
        ("t.csv", b"", "no column 'image'; its columns are: none"),
        ("t.csv", b"image,caption\nb.jpg,a dog, running\n", "line 2 of .* has 3 fields where the header has 2"),
        ("t.csv", b"image,caption\nb.jpg,\xff\xfe\n", "not UTF-8"),
        ("t.csv", b'image,caption\nb.jpg,"open\n', "the row at line 2 of .* has a quotation mark that is not closed"),
        ("t.csv", b"image,caption\n,a dog\n", "line 2 of .* names no image"),
        ("t.jsonl", b'{"image": "b.jpg", "caption": "x"}\n{"image"', "line 2 of .* is not JSON"),
        ("t.jsonl", b"[1, 2]\n", "line 1 of .* is not a JSON object but list"),
        ("t.jsonl", b'{"image": "b.jpg", "caption": 5}\n', r"line 1 of .* not text but int \(5\)"),
        ("t.jsonl", b'{"image": "b.jpg", "caption": ["x", {}]}\n', "not text but dict"),
        ("t.jsonl", b'{"image": 3, "caption": "x"}\n', "line 1 of .* names no image"),
        ("t.parquet", b"PAR1 no, not really", "cannot read the table"),
        ("t.xlsx", b"", "expected .csv, .tsv, .jsonl, .ndjson, .json or .parquet"),
    ],
)
def test_unusable_tables(folder, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(folder, tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_table_by_itself(tmp_path):
    table = read_table(write_table(tmp_path / "t.csv", [("b.jpg", "x"), ("a.jpg", "y"), ("b.jpg", "z")]))
    assert list(table.captions.items()) == [("b.jpg", ("x", "z")), ("a.jpg", ("y",))]


def test_image_folder_reports_a_vanished_file(folder):
    source = ImageFolder(folder, ["gone.jpg"])
    with pytest.raises(ImageError, match=r"gone\.jpg': there is no such file"):
        source.open_bytes(0)
