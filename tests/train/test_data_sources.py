"""From the data section of a recipe to sources, their targets and their augmentation."""

from pathlib import Path

import pytest

from opencoca.data import LabelSource
from opencoca.train.data_sources import open_train_source, open_val_source
from opencoca.train.trainer import Trainer

from .helpers import Pairs, tiny_recipe, write_pairs


def label_table(pairs: Pairs, path: Path, column: str) -> Path:
    path.write_text(f"image,{column}\n" + "".join(f"{key},kind {key[-5]}\n" for key in pairs.captions))
    return path


def test_labels_and_captions_of_training_and_validation(pairs: Pairs, tmp_path: Path) -> None:
    labels = str(label_table(pairs, tmp_path / "labels.csv", "kind"))
    changes = {"data__train_labels": labels, "data__val_labels": labels, "data__label_column": "kind"}
    recipe = tiny_recipe(pairs, tmp_path / "run", **changes)
    plain = open_train_source(tiny_recipe(pairs, tmp_path / "plain"))
    for source in (open_train_source(recipe), open_val_source(recipe)):
        assert source is not None
        assert [source.target(index) for index in range(len(source))] == [
            f"kind {source.key(index)[-5]}" for index in range(len(source))
        ]
        assert [source.captions(index) for index in range(len(source))] == [
            plain.captions(index) for index in range(len(plain))
        ]


def test_columns_of_training_and_validation(pairs: Pairs, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("file,words\n" + "".join(f"{key},about {key}\n" for key in pairs.captions))
    names = {"data__image_column": "file", "data__caption_column": "words"}
    tables = {"data__train_captions": str(table), "data__val_captions": str(table)}
    recipe = tiny_recipe(pairs, tmp_path / "run", **names, **tables)
    for source in (open_train_source(recipe), open_val_source(recipe)):
        assert source is not None
        assert source.captions(0) == (f"about {source.key(0)}",)


def test_labels_alone_are_enough(pairs: Pairs, tmp_path: Path) -> None:
    labels = str(label_table(pairs, tmp_path / "labels.csv", "label"))
    recipe = tiny_recipe(pairs, tmp_path / "run", data__train_labels=labels, data__train_captions=None)
    source = open_train_source(recipe)
    assert source.target(0) == f"kind {source.key(0)[-5]}"
    assert source.captions(0) == ()


@pytest.mark.parametrize("labels", ["captions", "folders"])
def test_labels_as_texts(pairs: Pairs, tmp_path: Path, labels: str) -> None:
    recipe = tiny_recipe(pairs, tmp_path / "run")
    part = {"images": str(Path(recipe.data.train_images).parent), "labels": labels, "prompts": ["look: {}"]}
    folder = Path(recipe.data.train_images).name
    if labels == "captions":
        (tmp_path / "t.csv").write_text("image,kind\n" + "".join(f"{folder}/{key},a_b\n" for key in pairs.captions))
        part |= {"captions": str(tmp_path / "t.csv"), "caption_column": "kind"}
    changes = {"data__sources": [part], "data__train_images": "", "data__train_captions": None}
    source = open_train_source(tiny_recipe(pairs, tmp_path / "labels", **changes))
    assert isinstance(source, LabelSource)
    expected = "a b" if labels == "captions" else folder.replace("_", " ")
    assert {source.captions(index) for index in range(len(source))} == {(f"look: {expected}",)}


def test_rand_augment_reaches_the_training_images(pairs: Pairs, tmp_path: Path) -> None:
    with_it, without = (
        Trainer(tiny_recipe(pairs, tmp_path / name, **changes)).batches.loader.batch(0, 0)
        for name, changes in (("with", {"data__rand_augment": [2, 20]}), ("without", {}))
    )
    assert with_it.images is not None
    assert without.images is not None
    assert with_it.keys == without.keys
    assert bool((with_it.images != without.images).any())
    with pytest.raises(ValueError, match=r"rand_augment must be .* got \(0, 20"):
        Trainer(tiny_recipe(pairs, tmp_path / "bad", data__rand_augment=[0, 20]))


def test_a_validation_image_that_cannot_be_read_is_named_once(tmp_path: Path) -> None:
    recipe = tiny_recipe(write_pairs(tmp_path / "data", count=10), tmp_path / "run")
    source = open_val_source(recipe)
    assert source is not None
    Path(source.place(2).file).write_bytes(b"\x89PNG\r\n\x1a\n")
    validator = Trainer(recipe).validator
    assert validator is not None
    with pytest.warns(UserWarning, match="; validation leaves it out") as warned:
        counts = [sum(len(indices) for indices, _, _ in validator._inputs(0, 1)) for _ in range(2)]
    assert counts == [len(source) - 1] * 2
    messages = [str(warning.message) for warning in warned if "validation" in str(warning.message)]
    assert len(messages) == 1
    assert source.key(2) in messages[0]
