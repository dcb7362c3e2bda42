"""A run that was stopped and continued equals one that was not, to the last bit."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoca.train import Recipe, train
from opencoca.train.step import TrainStep
from opencoca.train.trainer import Trainer, TrainingInterrupted

from .helpers import (
    Pairs,
    ask_to_stop,
    files_of_checkpoints,
    read_lines,
    read_state,
    read_tensors,
    run_until_stopped,
    tiny_recipe,
)

# Ten images in batches of 4 with the rest dropped: 2 steps an epoch, 10 steps, validation after steps 4, 8 and 10.
EVERYTHING_RANDOM = {
    "model__text__dropout": 0.1,
    "model__image__dropout": 0.1,
    "model__pooler__dropout": 0.1,
    "data__captions_per_image": 2,
    "data__color_jitter": 0.2,
    "optimizer__ema_decay": 0.9,
    "loss__label_smoothing": 0.1,
    "epochs": 5,
    "validate_every_epochs": 2,
    "log_every_steps": 3,
    "accumulation_steps": 2,
}
CACHED = {"encoder__frozen_stages": 2, "encoder__cache_features": True, "encoder__cache_views": 4}
SETTINGS = {
    "pixels-fp32": {"precision": "fp32"},
    "pixels-bf16": {"precision": "bf16"},
    "cached-fp32": {"precision": "fp32", **CACHED},
    "cached-bf16": {"precision": "bf16", **CACHED},
    "workers": {"precision": "fp32", "data__num_workers": 2},
    "rewarded": {"precision": "fp32", "task__reward_weight": 1.0, "task__reward_samples": 2},
}


@pytest.fixture(scope="module")
def uninterrupted(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, runs = tmp_path_factory.mktemp("uninterrupted"), {}

    def get(name: str) -> Path:
        if name not in runs:
            runs[name] = train(tiny_recipe(pairs, folder / name, **EVERYTHING_RANDOM, **SETTINGS[name]))
        return runs[name]

    return get


def assert_same_run(first: Path, second: Path) -> None:
    our_state, our_index = read_state(first)
    their_state, their_index = read_state(second)
    assert without_times(our_index.progress) == without_times(their_index.progress)
    assert our_index.average_updates == their_index.average_updates
    for kind, ours, theirs in (
        ("state", our_state, their_state),
        ("model", read_tensors(first / "model.safetensors")[0], read_tensors(second / "model.safetensors")[0]),
    ):
        assert ours.keys() == theirs.keys()
        differing = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert not differing, f"{kind}: {differing[:5]}"
    assert read_lines(first) == read_lines(second)
    for name in ("val_captions.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def without_times(progress: dict[str, Any]) -> dict[str, Any]:
    progress = {key: value for key, value in progress.items() if key != "seconds"}
    progress["window"] = {k: v for k, v in progress["window"].items() if k not in ("seconds", "waited")}
    return progress


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_and_continued_equals_uninterrupted(
    name: str, pairs: Pairs, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(pairs, tmp_path / "run", **EVERYTHING_RANDOM, **SETTINGS[name])
    # In the middle of an epoch and of a window of metrics; during validation; at an epoch's end; in the last epoch.
    stopped = run_until_stopped(recipe, steps=1)
    assert stopped.state.progress["step"] == 1
    assert run_until_stopped(recipe, validations=1).state.progress["step"] == 4
    assert run_until_stopped(recipe, steps=2).state.progress["step"] == 6
    assert run_until_stopped(recipe, steps=3).state.progress["step"] == 9
    assert_same_run(train(recipe), uninterrupted(name))


def test_the_comparison_sees_randomness(pairs: Pairs, uninterrupted: Callable[[str], Path], tmp_path: Path) -> None:
    folder = train(tiny_recipe(pairs, tmp_path / "run", **EVERYTHING_RANDOM, seed=1))
    with pytest.raises(AssertionError):
        assert_same_run(folder, uninterrupted("pixels-fp32"))


def test_a_crash_loses_only_what_came_after_the_last_checkpoint(
    pairs: Pairs, uninterrupted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(pairs, tmp_path / "run", **EVERYTHING_RANDOM)
    real_step, calls = TrainStep.__call__, []

    def crashing(self: TrainStep, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:  # the checkpoint is that of step 4; a line of metrics was written at step 6
            raise MemoryError("out of memory")
        return real_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", crashing)
        with pytest.raises(MemoryError):
            train(recipe)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert read_lines(tmp_path / "run")[-1]["step"] == 6
    with metrics.open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 7, "lo')  # cut off in the middle of a line
    assert_same_run(train(recipe), uninterrupted("pixels-fp32"))


def test_a_finished_run_is_left_as_it_is(pairs: Pairs, uninterrupted: Callable[[str], Path]) -> None:
    folder = uninterrupted("pixels-fp32")
    names = ("model.safetensors", "metrics.jsonl", "val_captions.json")
    before = {name: (folder / name).read_bytes() for name in names} | files_of_checkpoints(folder)
    recipe = tiny_recipe(pairs, folder, **EVERYTHING_RANDOM, **SETTINGS["pixels-fp32"])
    assert train(recipe) == folder
    assert {name: (folder / name).read_bytes() for name in names} | files_of_checkpoints(folder) == before


def test_signals_are_handled_during_the_run_alone(pairs: Pairs, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    recipe = tiny_recipe(pairs, tmp_path / "run")
    run_until_stopped(recipe, steps=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_that_ends_the_workers_too_still_saves(pairs: Pairs, tmp_path: Path) -> None:
    recipe = tiny_recipe(pairs, tmp_path / "run", epochs=4)
    trainer = Trainer(recipe)
    real = trainer.batches.iterate

    def dying(step: int) -> Any:
        supply = real(step)
        yield next(supply)
        ask_to_stop()
        raise RuntimeError("DataLoader worker exited unexpectedly")

    trainer.batches.iterate = dying
    with pytest.raises(TrainingInterrupted, match="after step 1 of 8"):
        trainer.run()
    again = Trainer(recipe)
    again.run()
    assert again.state.progress["step"] == 8


def test_a_failing_worker_without_a_signal_is_an_error(pairs: Pairs, tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(pairs, tmp_path / "run"))

    def dying(step: int) -> Any:
        raise RuntimeError("DataLoader worker exited unexpectedly")
        yield

    trainer.batches.iterate = dying
    with pytest.raises(RuntimeError, match="worker"):
        trainer.run()


@pytest.mark.parametrize(("first", "then"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_continued_run_keeps_the_precision_that_was_chosen(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, first: str, then: str
) -> None:
    def prefer(precision: str) -> None:
        monkeypatch.setattr("opencoca.system.devices.multiplies_bfloat16", lambda: precision == "bf16")

    recipe = tiny_recipe(pairs, tmp_path / "run", precision="auto")
    prefer(first)
    assert run_until_stopped(recipe, steps=2).recipe.precision == first
    assert f"precision {first} (chosen for cpu)" in capsys.readouterr().err
    prefer(then)
    again = Trainer(recipe)
    assert again.recipe.precision == first
    assert json.loads((tmp_path / "run/recipe.json").read_text())["precision"] == first
    # One that is named is another recipe, unless it is the same.
    with pytest.raises(ValueError, match=f"precision: '{first}' then, '{then}' now"):
        Trainer(tiny_recipe(pairs, tmp_path / "run", precision=then))
    Trainer(tiny_recipe(pairs, tmp_path / "run", precision=first))


HARMLESS = {
    "log_every_steps": 1,
    "checkpoint_minutes": 3.0,
    "data__num_workers": 1,
    "device": "auto",
    "tensorboard": False,
    "encoder__cache_dir": "elsewhere",
    "checkpoint__keep_last": 5,
    "checkpoint__in_background": False,
    "safety__non_finite": "skip",
    "safety__hang_minutes": 0.0,
}
HARMFUL: dict[str, Any] = {
    "epochs": 3,
    "max_steps": 3,
    "seed": 1,
    "batch_size": 5,
    "precision": "bf16",
    "optimizer__learning_rate": 1e-4,
    "optimizer__ema_decay": 0.5,
    "model__text__dropout": 0.5,
    "model__text__width": 64,
    "data__flip_probability": 0.0,
    "validate_every_epochs": 2,
    "tokenizer__vocab_size": 300,
    "task__caption_weight": 1.0,
    "safety__spike_deviations": 6.0,
}


@pytest.fixture(scope="module")
def begun(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[..., Recipe]]:
    folder = tmp_path_factory.mktemp("begun") / "run"
    run_until_stopped(tiny_recipe(pairs, folder), steps=1)

    def recipe(output: Path = folder, **changes: Any) -> Recipe:
        return tiny_recipe(pairs, output, **changes)

    return folder, recipe


@pytest.mark.parametrize("key", HARMFUL)
def test_another_recipe_is_refused_by_key(key: str, begun: tuple[Path, Callable[..., Recipe]]) -> None:
    folder, recipe = begun
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="another recipe") as error:
        Trainer(recipe(**{key: HARMFUL[key]}))
    message = str(error.value)
    assert key.replace("__", ".") in message
    assert str(folder) in message
    assert repr(HARMFUL[key]) in message
    assert "--output" in message
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_recipe_stored_by_an_earlier_version_is_the_same(begun: tuple[Path, Callable[..., Recipe]]) -> None:
    """With the objective in a section of its own; and a difference in it is still found."""
    folder, recipe = begun
    path = folder / "recipe.json"
    today = path.read_text(encoding="utf-8")
    stored = json.loads(today)
    task = stored.pop("task")
    stored |= {"select_by": task.pop("select_by"), "val_max_new_tokens": task.pop("max_new_tokens")}
    del task["name"], stored["init_from"]
    try:
        path.write_text(json.dumps(stored | {"loss": task | {"caption_weight": 7.0}}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"task\.caption_weight: 7\.0 then, 2\.0 now"):
            Trainer(recipe())
        path.write_text(json.dumps(stored | {"loss": task}), encoding="utf-8")
        assert Trainer(recipe()).checkpoints.exist()
    finally:
        path.write_text(today, encoding="utf-8")


def test_settings_that_the_weights_do_not_depend_on_may_change(begun: tuple[Path, Callable[..., Recipe]]) -> None:
    Trainer(begun[1](**HARMLESS))
    moved = begun[0].rename(begun[0].with_name("moved"))
    try:
        Trainer(begun[1](**HARMLESS, output=moved))
    finally:
        moved.rename(begun[0])


def test_a_damaged_record_of_the_recipe_is_an_error(pairs: Pairs, tmp_path: Path) -> None:
    recipe = tiny_recipe(pairs, tmp_path / "run")
    run_until_stopped(recipe, steps=1)
    (tmp_path / "run" / "recipe.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"recipe\.json is damaged"):
        Trainer(recipe)


def test_a_start_that_left_no_checkpoint_binds_nobody(pairs: Pairs, tmp_path: Path) -> None:
    first = Trainer(tiny_recipe(pairs, tmp_path / "run", tokenizer__vocab_size=330))
    second = Trainer(tiny_recipe(pairs, tmp_path / "run", tokenizer__vocab_size=280))
    assert second.best.tokenizer.vocab_size == 280 < first.best.tokenizer.vocab_size


def test_settings_that_are_newer_than_the_run_have_their_defaults(pairs: Pairs, tmp_path: Path) -> None:
    recipe = tiny_recipe(pairs, tmp_path / "run")
    run_until_stopped(recipe, steps=1)
    path = tmp_path / "run" / "recipe.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    del stored["checkpoint"], stored["safety"]["spike_deviations"], stored["optimizer"]["eps"], stored["seed"]
    path.write_text(json.dumps(stored), encoding="utf-8")
    Trainer(recipe)
    path.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(ValueError, match=r"optimizer\.eps: 1e-08 then, 1e-06 now"):
        Trainer(tiny_recipe(pairs, tmp_path / "run", optimizer__eps=1e-6))
