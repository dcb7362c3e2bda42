"""Eight pairs can be learned by heart, through everything that a real run goes through."""

import json
from pathlib import Path

import pytest
from PIL import Image

import opencoca
from opencoca.train import train

from .helpers import Pairs, read_lines, tiny_recipe, write_pairs


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pairs]:
    """A run that has seen eight pairs a hundred times."""
    folder = tmp_path_factory.mktemp("overfit")
    pairs = write_pairs(folder, count=8)
    recipe = tiny_recipe(
        pairs,
        folder / "run",
        model__embed_dim=32,
        data__crop_scale=[1.0, 1.0],
        data__crop_ratio=[1.0, 1.0],
        data__flip_probability=0.0,
        optimizer__learning_rate=5e-3,
        optimizer__warmup_steps=10,
        batch_size=8,
        epochs=100,
        validate_every_epochs=50,
        val_max_new_tokens=20,
        log_every_steps=10,
    )
    return train(recipe), pairs


def test_captions_are_exact_and_every_pair_is_found(learned: tuple[Path, Pairs]) -> None:
    folder, pairs = learned
    expected = {name: captions[0] for name, captions in pairs.captions.items()}
    assert json.loads((folder / "val_captions.json").read_text(encoding="utf-8")) == expected
    last = [line for line in read_lines(folder) if line["kind"] == "validation"][-1]
    assert last["image_to_text_r1"] == 1
    assert last["text_to_image_r1"] == 1
    assert last["bleu_4"] == pytest.approx(1)
    assert last["num_images"] == last["num_texts"] == 8


def test_the_run_folder_is_a_model_that_does_the_same(learned: tuple[Path, Pairs]) -> None:
    folder, pairs = learned
    pipeline = opencoca.load(folder, device="cpu")
    paths = [pairs.images / name for name in pairs.captions]
    assert pipeline.caption(paths) == [captions[0] for captions in pairs.captions.values()]
    similarity = pipeline.similarity(paths, [captions[0] for captions in pairs.captions.values()])
    assert similarity.argmax(dim=1).tolist() == similarity.argmax(dim=0).tolist() == list(range(8))
    assert pipeline.info["step"] in (50, 100)
    assert pipeline.info["validation"]["image_to_text_r1"] == 1


def test_loss_falls_to_almost_nothing(learned: tuple[Path, Pairs]) -> None:
    lines = [line for line in read_lines(learned[0]) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(10, 101, 10))
    assert lines[-1]["loss"] < 0.05 * lines[0]["loss"]


def test_the_report_is_a_picture_with_photographs(learned: tuple[Path, Pairs]) -> None:
    with Image.open(learned[0] / "report.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert 800 < picture.width < 3000
        assert 600 < picture.height < 3000
        colors = picture.convert("RGB").getcolors(maxcolors=1 << 24)
    assert colors is not None
    assert len(colors) > 100
