"""Whatever is given on the command line becomes one list of images, each once, in order."""

import base64
import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoca.data import ImageError, SampleSource
from opencoca.recaption.inputs import common_folder, open_inputs, text_files_beside

from .helpers import image_bytes, write_images, write_shard


def keys(source: SampleSource) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def contents(source: SampleSource) -> list[bytes]:
    return [source.open_bytes(index) for index in range(len(source))]


def write_table(path: Path, names: list[str], column: str = "image") -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({column: names, "caption": ["x"] * len(names)}), path)
        return path
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([[column, "caption"], *([name, "x"] for name in names)])
    return path


def test_files_and_folders_in_the_order_given(tmp_path: Path) -> None:
    first, second = write_images(tmp_path / "1", 4), write_images(tmp_path / "2", 3)
    source = open_inputs([second[1], str(tmp_path / "1"), str(tmp_path / "2"), "missing.jpg"])
    assert keys(source) == [second[1], *first, second[0], second[2], "missing.jpg"]
    assert contents(open_inputs(first)) == [Path(path).read_bytes() for path in first]


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "folder.jpg"
    folder.mkdir()
    write_images(folder, 1)
    source = open_inputs([str(tmp_path / "no.jpg"), str(folder / "a")])
    with pytest.raises(ImageError, match=r"no\.jpg': there is no such file"):
        source.open_bytes(0)
    assert source.open_bytes(1) == image_bytes(0)


def test_globs(tmp_path: Path) -> None:
    paths = write_images(tmp_path, 5)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    write_table(tmp_path / "a" / "table.csv", ["000.png"])
    assert keys(open_inputs([f"{tmp_path}/a/*"])) == [path for path in paths if "/a/" in path]
    assert keys(open_inputs([f"{tmp_path}/**/*.png"])) == paths
    assert keys(open_inputs([f"{tmp_path}/*"])) == paths
    assert keys(open_inputs([f"{tmp_path}/**/*.csv"])) == [f"{tmp_path}/a/000.png"]
    with pytest.raises(ValueError, match=r"no images that match .*\*\.jpg"):
        open_inputs([f"{tmp_path}/*.jpg"])
    literal = tmp_path / "[1].png"
    literal.write_bytes(image_bytes(1))
    assert keys(open_inputs([str(literal)])) == [str(literal)]


def test_shards(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"{number:02d}.tar", [10 * number, 10 * number + 1])
    names = [f"{tmp_path}/{number:02d}.tar/{10 * number + k:05d}" for number in range(3) for k in range(2)]
    for arguments in (
        [str(tmp_path)],
        [f"{tmp_path}/*.tar"],
        [f"{tmp_path}/{{00..02}}.tar"],
        [str(tmp_path / "00.tar"), str(tmp_path)],
    ):
        source = open_inputs(arguments)
        assert keys(source) == names
        assert contents(source) == [image_bytes(10 * number + k) for number in range(3) for k in range(2)]
    with pytest.raises(FileNotFoundError, match=r"03\.tar"):
        open_inputs([f"{tmp_path}/{{00..03}}.tar"])


def test_a_folder_of_images_and_shards(tmp_path: Path) -> None:
    paths = write_images(tmp_path, 2)
    write_shard(tmp_path / "b" / "s.tar", [7])
    assert keys(open_inputs([str(tmp_path)])) == [*paths, f"{tmp_path}/b/s.tar/00007"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        open_inputs([str(tmp_path / "empty")])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_of_files(tmp_path: Path, suffix: str) -> None:
    paths = write_images(tmp_path / "photos", 3)
    names = [str(Path(path).relative_to(tmp_path / "photos")) for path in paths]
    table = write_table(tmp_path / "photos" / f"t{suffix}", [names[2], names[0], names[2], names[1]], "file name")
    expected = [paths[2], paths[0], paths[1]]
    assert keys(open_inputs([str(table)], image_column="file name")) == expected
    moved = table.rename(tmp_path / f"t{suffix}")
    assert keys(open_inputs([str(moved)], image_column="file name", image_root=tmp_path / "photos")) == expected
    absolute = write_table(tmp_path / f"absolute{suffix}", paths)
    assert keys(open_inputs([str(absolute)])) == paths
    with pytest.raises(ValueError, match="no column 'image'; its columns are: 'file name', 'caption'"):
        open_inputs([str(moved)])


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_that_holds_the_images(tmp_path: Path, as_struct: bool) -> None:
    data = [image_bytes(seed) for seed in range(7)]
    cells = [{"bytes": cell, "path": f"{i}.png"} for i, cell in enumerate(data)] if as_struct else list(data)
    cells.insert(3, None)
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": cells}), table, row_group_size=3)
    source = open_inputs([str(table)])
    assert keys(source) == [f"{table}#{row}" for row in range(8)]
    for index in (0, 7, 2, 4, 1, 6, 5):
        assert source.open_bytes(index) == data[index - (index > 3)]
    with pytest.raises(ImageError, match="#3': the row holds no image"):
        source.open_bytes(3)


def test_parquet_in_a_folder_and_base64(tmp_path: Path) -> None:
    data = [image_bytes(seed) for seed in range(2)]
    (tmp_path / "sub").mkdir()
    pq.write_table(pa.table({"image": data}), tmp_path / "sub" / "t.parquet")
    write_table(tmp_path / "names.parquet", ["x.png"])
    source = open_inputs([str(tmp_path)])
    assert keys(source) == [f"{tmp_path}/sub/t.parquet#{row}" for row in range(2)]
    assert contents(source) == data
    text = write_table(tmp_path / "t.csv", [base64.b64encode(cell).decode() for cell in data])
    assert contents(open_inputs([str(text)])) == data


def test_paths_in_parquet_and_other_unicode_forms(tmp_path: Path) -> None:
    paths = write_images(tmp_path / "i", 1)
    decomposed = Path(paths[0]).rename(tmp_path / "i" / "cafe\u0301.png")
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "caf\u00e9.png"}]}), tmp_path / "t.parquet")
    source = open_inputs([str(tmp_path / "t.parquet")], image_root=tmp_path / "i")
    assert contents(source) == [image_bytes(0)]
    table = write_table(tmp_path / "t.csv", ["caf\u00e9.png", "a\0.png"])
    source = open_inputs([str(table)], image_root=tmp_path / "i")
    assert keys(source)[0] == str(decomposed)
    with pytest.raises(ImageError, match="null byte"):
        source.open_bytes(1)


def test_text_files_beside(tmp_path: Path) -> None:
    paths = write_images(tmp_path, 3)
    assert text_files_beside(open_inputs(paths)) == [path.replace(".png", ".txt") for path in paths]
    assert common_folder(open_inputs(paths)) == tmp_path
    Path(paths[0]).with_suffix(".jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000\.jpg' and .*000\.png' would both .*000\.txt"):
        text_files_beside(open_inputs([str(tmp_path)]))
    shard = write_shard(tmp_path / "s.tar", [1])
    with pytest.raises(ValueError, match="not a file of its own"):
        text_files_beside(open_inputs([paths[1], str(shard)]))
