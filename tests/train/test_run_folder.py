"""What a run's folder is bound to: nothing of another's is overwritten, and its data stay what they were."""

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opencoca.system.messages import brief
from opencoca.system.process_lock import ProcessLock
from opencoca.train import Recipe, train
from opencoca.train.trainer import Trainer

from .helpers import Pairs, content, read_lines, read_state, run_until_stopped, tiny_recipe, write_pairs

EVERY_STEP = {"checkpoint__every_steps": 1}


@pytest.fixture
def own_pairs(tmp_path: Path) -> Pairs:
    """Eight images whose table the test may change: 2 steps an epoch."""
    return write_pairs(tmp_path / "own", count=8)


def change_table(pairs: Pairs, rows: int, caption: str | None = None) -> None:
    with pairs.table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        writer.writerows([(name, caption or own[0]) for name, own in list(pairs.captions.items())[:rows]])


def refused(recipe: Recipe, continue_with: tuple[str, ...] = ()) -> str:
    """The sentence with which the run is refused; nothing in its folder has changed."""
    folder = Path(recipe.output)
    before = content(folder)
    with pytest.raises(ValueError, match=r"\S") as error:
        Trainer(recipe, continue_with=continue_with)
    before.pop(".lock", None)  # of a trainer that never ran
    assert content(folder) == before
    assert "\n" not in str(error.value)
    return str(error.value).replace(brief(folder, 60), "FOLDER")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("config.json", "model.safetensors", "tokenizer.json"), "a model"),
        (("thesis.tex",), "'thesis.tex'"),
        (("recipe.json",), "'recipe.json'"),  # somebody's cooking
    ],
)
def test_a_folder_with_what_no_run_made_is_left_as_it_is(
    names: tuple[str, ...], what: str, pairs: Pairs, output: Path
) -> None:
    output.mkdir()
    for name in names:
        (output / name).write_text('{"eggs": 3}')
    message = refused(tiny_recipe(pairs, output))
    assert message.startswith(f"FOLDER holds {what} that no training run made; choose another --output")


def test_a_folder_of_images_is_not_written_into(pairs: Pairs) -> None:
    assert "holds 'image0.png'" in refused(tiny_recipe(pairs, pairs.images))


def test_logs_and_hidden_files_are_no_hindrance(pairs: Pairs, output: Path) -> None:
    output.mkdir()
    for name in (".gitignore", "slurm-17.out", "mine.yaml"):
        (output / name).touch()
    Trainer(tiny_recipe(pairs, output))


def test_a_model_whose_checkpoints_are_gone_is_not_overwritten_by_another_recipe(pairs: Pairs, output: Path) -> None:
    output.mkdir()
    Trainer(tiny_recipe(pairs, output))
    (output / "model.safetensors").touch()
    assert "optimizer.eps" in refused(tiny_recipe(pairs, output, optimizer__eps=1e-6))
    Trainer(tiny_recipe(pairs, output))  # the same one was killed before its first checkpoint


@pytest.fixture
def begun(own_pairs: Pairs, output: Path) -> Callable[..., Recipe]:
    """A run of 4 steps that was stopped after 2; gives its recipe with changes."""

    def recipe(**changes: Any) -> Recipe:
        return tiny_recipe(own_pairs, output, **EVERY_STEP, **changes)

    run_until_stopped(recipe(), steps=2)
    return recipe


def test_changed_data_are_noticed(begun: Callable[..., Recipe], own_pairs: Pairs) -> None:
    change_table(own_pairs, rows=5)
    message = refused(begun())
    assert "train: 8 samples then, 5 now; validation: 8 samples then, 5 now" in message
    assert message.endswith("--continue-with data")
    assert len(message) < 300
    change_table(own_pairs, rows=8, caption="other words")
    assert "train: other names, captions or targets" in refused(begun())
    change_table(own_pairs, rows=8)
    assert train(begun()).is_dir()


def test_a_changed_validation_set_is_noticed_and_chooses_the_best_anew(
    begun: Callable[..., Recipe], own_pairs: Pairs, tmp_path: Path, output: Path
) -> None:
    table = tmp_path / "val.csv"
    table.write_text("image,caption\nimage3.png,a bird\n")
    changes = {"data__val_captions": str(table)}
    assert "data.val_captions" in refused(begun(**changes))
    progress = read_state(output)[1].progress
    trainer = Trainer(begun(**changes), continue_with=["data.val_captions"])
    trainer.run()
    state = trainer.state.progress
    assert progress["scored_by"] != state["scored_by"]
    assert list(json.loads((output / "val_captions.json").read_text())) == ["image3.png"]
    phases = json.loads((output / "run.json").read_text())["phases"]
    assert [phase["from_step"] for phase in phases] == [2]
    assert any("validation: 8 samples then, 1 now" in change for change in phases[0]["changes"])


def test_a_run_goes_on_with_other_data_if_told_so(begun: Callable[..., Recipe], own_pairs: Pairs, output: Path) -> None:
    change_table(own_pairs, rows=4)
    # Four images are one step an epoch: two epochs would end where the run stands.
    assert "has taken 2 steps already, and ends after 2" in refused(begun(), ("data",))
    recipe = begun(epochs=5)
    trainer = Trainer(recipe, continue_with=["epochs", "data"])
    assert trainer.total_steps == 5
    trainer.run()
    assert [line["step"] for line in read_lines(output) if line["kind"] == "validation"][-1] == 5
    assert Trainer(recipe).total_steps == 5  # the run's own recipe and data now


def test_more_epochs_equal_a_run_that_had_them_from_its_first_step_where_the_rate_is_constant(
    own_pairs: Pairs, tmp_path: Path
) -> None:
    def recipe(name: str, epochs: int) -> Recipe:
        return tiny_recipe(own_pairs, tmp_path / name, epochs=epochs, optimizer__decay="constant")

    train(recipe("more", 1))
    message = refused(recipe("more", 3))
    assert "epochs: 1 then, 3 now" in message
    assert message.endswith("or go on with --continue-with epochs=3")
    train(recipe("more", 3), continue_with=["epochs"])
    train(recipe("whole", 3))
    ours, theirs = read_state(tmp_path / "more")[0], read_state(tmp_path / "whole")[0]
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours if key.startswith("model/"))


def test_what_weights_would_not_fit_cannot_be_continued_with(begun: Callable[..., Recipe]) -> None:
    message = refused(begun(model__text__width=64), ("model.text.width",))
    assert "cannot be continued with another model.text.width" in message
    assert "init_from" in message


def test_a_run_of_before_has_no_record_and_continues(begun: Callable[..., Recipe], output: Path) -> None:
    (output / "run.json").unlink()
    Trainer(begun())
    assert json.loads((output / "run.json").read_text())["data"]["train"][0] == 8


def test_a_damaged_record_is_named(begun: Callable[..., Recipe], output: Path) -> None:
    for name in ("run.json", "recipe.json"):
        whole = (output / name).read_text()
        for damaged in ("", "[" * 90_000, "[3]", '{"data": {"train": [1]}}', whole[:-9]):
            (output / name).write_text(damaged)
            message = refused(begun())
            assert f"{name} is damaged" in message
            assert len(message) < 300
        (output / name).write_text(whole)


def test_a_second_process_is_refused_with_the_number_of_the_first(pairs: Pairs, output: Path) -> None:
    recipe = tiny_recipe(pairs, output)
    output.mkdir()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        lock = ProcessLock(output / ".lock")
        lock.take()
        os.write(writing, b"1")
        signal.pause()  # until it is killed
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"1"
        with pytest.raises(ValueError, match=rf"is in use by another training run, process {child} on "):
            Trainer(recipe)
        assert not (output / "recipe.json").exists()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reading)
    train(recipe)
    assert not (output / ".lock").exists()


def test_the_number_of_threads_is_remembered(begun: Callable[..., Recipe], output: Path) -> None:
    assert Trainer(begun()).run_folder.threads() == 1
    assert json.loads((output / "run.json").read_text())["threads"] == 1


def test_sources_of_before_languages_go_on(own_pairs: Pairs, output: Path) -> None:
    """A section of a list may lack settings that came later."""
    part = {"images": str(own_pairs.images), "captions": str(own_pairs.table)}
    changes = {"data__train_images": "", "data__train_captions": None, "data__sources": [part]}
    recipe = tiny_recipe(own_pairs, output, **changes, **EVERY_STEP)
    run_until_stopped(recipe, 1)
    file = output / "recipe.json"
    stored = json.loads(file.read_text())
    (section,) = stored["data"]["sources"]
    assert section.pop("language") is None
    assert section.pop("language_column") is None
    file.write_text(json.dumps(stored))
    Trainer(recipe)
    section["separator"] = "; "
    file.write_text(json.dumps(stored))
    assert "data.sources" in refused(recipe)
