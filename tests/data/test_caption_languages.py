"""Captions know the language that their table, or the user, says they are in."""

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from opencoca.data import ImageFolder, LabelSource, mentions_side, open_source
from opencoca.data.identity import data_identity
from opencoca.data.languages import CaptionLanguages
from opencoca.data.source import SampleSource
from opencoca.tokenizer import LanguageText, language_of

from .helpers import write_images

ROWS = [("a.jpg", "en", "a dog"), ("a.jpg", "zh", "一只狗"), ("b.jpg", "de", "ein Hund"), ("b.jpg", "en", "the dog")]
EVERY = {("a.jpg", "a dog", "en"), ("a.jpg", "一只狗", "zh"), ("b.jpg", "ein Hund", "de"), ("b.jpg", "the dog", "en")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    return tmp_path / "images"


def write(path: Path, column: str = "lang", rows: list = ROWS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", column, "caption"), *rows])
    return path


def spoken(source: SampleSource) -> set[tuple[str, str, str | None]]:
    return {(source.key(i), str(text), language_of(text)) for i in range(len(source)) for text in source.captions(i)}


def test_a_column_names_the_language_of_each_row(folder: Path, tmp_path: Path):
    table = write(tmp_path / "t.csv")
    assert spoken(open_source(folder, table, languages=CaptionLanguages("lang"))) == EVERY
    assert {language for *_, language in spoken(open_source(folder, table))} == {None}


def test_one_language_is_read_alone(folder: Path, tmp_path: Path):
    table = write(tmp_path / "t.csv")
    source = open_source(folder, table, languages=CaptionLanguages("lang", "de", known=("de", "en")))
    assert spoken(source) == {("b.jpg", "ein Hund", "de")}
    assert len(source) == 1
    with pytest.raises(ValueError, match="holds no captions in the language 'fr'"):
        open_source(folder, table, languages=CaptionLanguages("lang", "fr"))


def test_a_table_without_the_column_is_in_the_language_that_is_given(folder: Path, tmp_path: Path):
    table = write(tmp_path / "t.csv", "other")
    source = open_source(folder, table, languages=CaptionLanguages("language", "zh", column_must_be=False))
    assert {language for *_, language in spoken(source)} == {"zh"}
    assert len(spoken(source)) == 4
    with pytest.raises(ValueError, match="no column 'language'"):
        open_source(folder, table, languages=CaptionLanguages("language", "zh"))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("xx", "'lang' names the unknown language 'xx'; known languages: en, zh, de"),
        ("", "no language in its column 'lang'"),
    ],
)
def test_a_wrong_language_is_named_with_its_place(folder: Path, tmp_path: Path, value: str, says: str):
    table = write(tmp_path / "t.csv", rows=[*ROWS, ("a.jpg", value, "ein Hund")])
    with pytest.raises(ValueError, match=rf"line 6 of .*t\.csv.*{says}"):
        open_source(folder, table, languages=CaptionLanguages("lang", known=("en", "zh", "de")))


def test_the_language_that_is_asked_for_must_be_known():
    with pytest.raises(ValueError, match="unknown language 'fr'; known languages: en, de"):
        CaptionLanguages(None, "fr", ("en", "de"))


def test_captions_without_a_table_are_in_the_language_that_is_given(folder: Path, tmp_path: Path):
    (folder / "a.txt").write_text("一只狗\n狗\n", encoding="utf-8")
    beside = open_source(folder, languages=CaptionLanguages(language="zh"))
    assert spoken(beside) == {("a.jpg", "一只狗", "zh"), ("a.jpg", "狗", "zh")}
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in (
            ("k.jpg", (folder / "a.jpg").read_bytes()),
            ("k.txt", "狗".encode()),
            ("l.jpg", (folder / "b.jpg").read_bytes()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    shards = open_source(tmp_path / "s.tar", languages=CaptionLanguages(language="zh"))
    assert [(str(text), language_of(text)) for text in shards.captions(0)] == [("狗", "zh")]
    table = write(tmp_path / "k.csv", rows=[("k", "zh", "猫"), ("k", "de", "eine Katze"), ("l", "zh", "狗")])
    again = open_source(tmp_path / "s.tar", table, languages=CaptionLanguages("lang", "de"))
    assert spoken(again) == {("k", "eine Katze", "de")}
    assert len(again) == 1
    with pytest.raises(ValueError, match="captions of shards have no column 'lang'"):
        open_source(tmp_path / "s.tar", languages=CaptionLanguages("lang"))


def test_prompts_of_labels_are_in_the_language_that_is_given(folder: Path):
    source = LabelSource(ImageFolder(folder, ["a.jpg"], targets={"a.jpg": "dog"}), language="en")
    drawn = source.draw_texts(0, source.read(0), 2, np.random.PCG64(0))
    assert drawn is not None
    assert [language_of(text) for text in (*source.captions(0), *drawn)] == ["en"] * 3


def test_of_a_table_that_holds_images_rows_of_other_languages_are_left_out(folder: Path, tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [(folder / name).read_bytes() for name, *_ in ROWS]
    table = {"image": images, "lang": [row[1] for row in ROWS], "caption": [row[2] for row in ROWS]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet", languages=CaptionLanguages("lang", "en"))
    assert [source.captions(index) for index in range(len(source))] == [("a dog",), ("the dog",)]
    assert source.key(1).endswith("#3")
    assert len(open_source(tmp_path / "t.parquet", languages=CaptionLanguages("lang"))) == 4


def test_data_in_another_language_are_other_data(folder: Path, tmp_path: Path):
    table = write(tmp_path / "t.csv")
    identities = {
        data_identity(open_source(folder, table, languages=languages)).digest
        for languages in (CaptionLanguages("lang"), CaptionLanguages(), CaptionLanguages(language="en"))
    }
    assert len(identities) == 3


@pytest.mark.parametrize(
    ("language", "text"),
    [
        *(("zh", "左边的狗"), ("de", "ein Hund links im Bild"), ("fr", "le chien à gauche"), ("cs", "pes vlevo")),
        *(("ar", "كلب على اليسار"), ("hi", "बाईं ओर कुत्ता"), ("en", "the dog on the left")),
    ],
)
def test_left_is_left_in_every_language(language: str, text: str):
    assert mentions_side(LanguageText(text, language))
    assert not mentions_side(LanguageText("一只 Hund chien pes كلب कुत्ता", language))
