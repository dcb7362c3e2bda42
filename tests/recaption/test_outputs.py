"""Rows come back from every format as they were written, and the same rows are the same bytes."""

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoca.data import read_table
from opencoca.recaption.outputs import write_rows, write_texts
from opencoca.system.files import WriteError

COLUMNS = ("image", "rank", "caption", "log_probability", "length", "flags")
NASTY = ["", "a, \"b\"\n'c'\t", "h\u00e9\u2028\U0001f415", "\r\n", "=1+1", "null"]


def make_rows(texts: list[str]) -> list[dict]:
    return [
        {
            "image": f"{i}.jpg",
            "rank": i,
            "caption": text,
            "log_probability": -0.1 * i,
            "length": i,
            "flags": ["common", "near-empty"][: i % 3],
        }
        for i, text in enumerate(texts)
    ]


def read_back(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {
            **row,
            "rank": int(row["rank"]),
            "length": int(row["length"]),
            "log_probability": float(row["log_probability"]),
            "flags": row["flags"].split(),
        }
        for row in rows
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@given(texts=st.lists(st.one_of(st.sampled_from(NASTY), st.text(st.characters(codec="utf-8"))), max_size=8))
def test_rows_come_back(tmp_path_factory: pytest.TempPathFactory, suffix: str, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = make_rows(texts)
    write_rows(folder / f"one{suffix}", iter(rows), COLUMNS)
    assert read_back(folder / f"one{suffix}") == rows
    write_rows(folder / f"two{suffix}", rows, COLUMNS)
    assert (folder / f"one{suffix}").read_bytes() == (folder / f"two{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_the_output_is_a_caption_table(tmp_path: Path, suffix: str) -> None:
    """So that a model can be trained on it."""
    path = tmp_path / f"t{suffix}"
    write_rows(path, make_rows(["a dog", "a cat"]), COLUMNS)
    assert read_table(path).captions == {"0.jpg": ("a dog",), "1.jpg": ("a cat",)}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_names_that_are_no_unicode(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    write_rows(path, [{**make_rows(["a dog"])[0], "image": "caf\udce9.png"}], COLUMNS)
    (row,) = read_back(path)
    assert row["image"] in ("caf\udce9.png", "caf\\udce9.png")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.jsonl, \.csv or \.parquet"):
        write_rows(tmp_path / "t.xlsx", [], COLUMNS)


def test_texts_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"cannot write .*x\.txt"):
        write_texts([(str(tmp_path / name), f"{name}\n") for name in ("1.txt", "no/x.txt", "2.txt")])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"1.txt": "1.txt\n", "2.txt": "2.txt\n"}
