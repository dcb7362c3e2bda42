"""A run over captions of several languages: each is shown with its token, and wrong ones are refused beforehand."""

import csv
from pathlib import Path
from typing import Any

import pytest

from opencoca.inference.loading import load
from opencoca.tokenizer import Tokenizer
from opencoca.train.recipe.recipe import Recipe
from opencoca.train.trainer import Trainer

from .helpers import Pairs, tiny_recipe, write_pairs

WORDS = {"en": "a dog", "zh": "一只狗", "de": "ein hund"}


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    made = write_pairs(tmp_path, 6)
    with made.table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "lang", "caption"))
        writer.writerows((name, language, text) for name in made.captions for language, text in WORDS.items())
    return made


def recipe_of(pairs: Pairs, output: Path, **changes: Any) -> Recipe:
    ours = {"tokenizer__languages": ["en", "zh", "de"], "data__language_column": "lang", "data__captions_per_image": 3}
    return tiny_recipe(pairs, output, **{**ours, **changes})


def test_each_caption_is_shown_with_its_language(pairs: Pairs, output: Path) -> None:
    trainer = Trainer(recipe_of(pairs, output, epochs=1, batch_size=2, data__drop_last=False))
    tokenizer = Tokenizer.load(output)
    expected = [tokenizer.in_language(language).encode(text) for language, text in WORDS.items()]
    batch = next(trainer.batches.iterate(0))
    rows = {tuple(row[mask].tolist()) for row, mask in zip(batch.token_ids, batch.token_mask, strict=True)}
    assert rows == set(map(tuple, expected))


def test_a_run_makes_a_model_of_several_languages(pairs: Pairs, output: Path) -> None:
    Trainer(recipe_of(pairs, output, epochs=1)).run()
    assert Tokenizer.load(output).languages == ("en", "zh", "de")
    pipeline = load(output)
    photo = pairs.images / "image0.png"
    said = {language: pipeline.caption_details(photo, language=language)[0][0].token_ids for language in WORDS}
    assert {ids[1] for ids in said.values()} == {3, 4, 5}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"tokenizer__languages": ["en", "zh"]},
            r"line 4 of .*images\.csv': the column 'lang' names the unknown language 'de'; known languages: en, zh",
        ),
        ({"data__language_column": None}, "the vocabulary has the languages en, zh, de, so data must say"),
        ({"tokenizer__languages": []}, "the vocabulary has none: set tokenizer.languages"),
        ({"tokenizer__source": "clip"}, "tokenizer.languages are for tokenizer.source train"),
        ({"data__language_column": "tongue"}, "no column 'tongue'"),
        ({"data__language": "fr"}, "unknown language 'fr'"),
        ({"tokenizer__languages": ["en", "en"]}, "more than once"),
    ],
)
def test_languages_that_do_not_fit_are_refused(pairs: Pairs, output: Path, changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Trainer(recipe_of(pairs, output, **changes))


def test_sources_have_languages_of_their_own(pairs: Pairs, output: Path) -> None:
    part = {"images": str(pairs.images), "captions": str(pairs.table)}
    sources = [{**part, "language_column": "lang", "language": "zh"}, {**part, "language": "de"}]
    changes = {"data__train_images": "", "data__train_captions": None, "data__sources": sources}
    trainer = Trainer(recipe_of(pairs, output, **changes))
    tokenizer = Tokenizer.load(output)
    first, second = ({tokenizer.encode(text)[1] for text in trainer.train_source.captions(index)} for index in (0, 6))
    assert (first, second) == ({4}, {5})
    del sources[1]["language"]
    with pytest.raises(ValueError, match=r"so each of data\.sources must say"):
        Trainer(recipe_of(pairs, output.with_name("other"), **changes))
