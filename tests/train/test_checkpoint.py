"""Checkpoints are whole or refused, and a full disk costs nothing that was saved before."""

from pathlib import Path
from typing import Any

import pytest
import torch

import opencoca
from opencoca.system.files import WriteError
from opencoca.train import Recipe, train
from opencoca.train.trainer import Trainer
from opencoca.train.validation import ValidationScores

from .helpers import (
    AfterCall,
    Pairs,
    content,
    files_of_checkpoints,
    flip_bit,
    largest_file,
    newest_checkpoint,
    read_lines,
    read_state,
    run_until_stopped,
    tiny_recipe,
)


@pytest.fixture
def trainer(pairs: Pairs, output: Path) -> Trainer:
    """A run of 4 steps, stopped after the first, begun again."""
    recipe = tiny_recipe(pairs, output, optimizer__ema_decay=0.9)
    run_until_stopped(recipe, steps=1)
    return Trainer(recipe)


def test_a_checkpoint_holds_all_of_the_state(trainer: Trainer) -> None:
    tensors, index = read_state(trainer.folder)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    for name in trained:
        expected = {f"{part}/{name}" for part in ("model", "average", "optimizer/exp_avg", "optimizer/step")}
        assert expected <= index.tensors.keys()
    assert {"random/0/torch", "random/0/python", "random/0/numpy"} <= tensors.keys()
    assert index.progress["step"] == index.step == 1


def test_a_flipped_bit_is_a_warning_and_the_run_is_the_same(pairs: Pairs, output: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(pairs, output, optimizer__ema_decay=0.9, epochs=3)
    run_until_stopped(recipe, steps=3)
    assert newest_checkpoint(output).name == "step-00000003"
    flip_bit(newest_checkpoint(output) / "rank-00000.safetensors", 100_000)
    with pytest.warns(UserWarning, match=r"step-00000003/rank-00000\.safetensors is damaged"):
        train(recipe)
    whole = train(tiny_recipe(pairs, tmp_path / "whole", optimizer__ema_decay=0.9, epochs=3))
    ours, theirs = read_state(output)[0], read_state(whole)[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert read_lines(output) == read_lines(whole)


def test_a_damaged_only_checkpoint_is_an_error(trainer: Trainer) -> None:
    flip_bit(newest_checkpoint(trainer.folder) / "rank-00000.safetensors")
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors is damaged.*or delete .*checkpoints to begin"):
        trainer.run()


def test_the_recipe_says_which_checkpoints_stay(pairs: Pairs, output: Path) -> None:
    options: dict[str, Any] = {"every_steps": 1, "keep_last": 2, "keep_every_steps": 3, "keep_best": True}
    recipe = tiny_recipe(pairs, output, epochs=5, select_by="loss", **{f"checkpoint__{k}": options[k] for k in options})
    trainer = Trainer(recipe)
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0])  # the best is that of step 4
    trainer.validator = lambda _: ValidationScores({"loss": (loss := next(losses))}, -loss, {})  # pyright: ignore
    trainer.run()
    names = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:08d}" for step in (3, 4, 6, 9, 10)]


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_a_truncated_model_is_refused(pairs: Pairs, output: Path, keep: float) -> None:
    train(tiny_recipe(pairs, output, epochs=1))
    path = output / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        opencoca.load(output)


CHANGES: dict[str, Any] = {
    "optimizer__ema_decay": 0.9,
    "epochs": 3,
    "log_every_steps": 1,
    "select_by": "loss",
    "checkpoint__in_background": False,
}


def stopped_at_the_first_validation(recipe: Recipe) -> dict[str, int]:
    """Sizes of its files in bytes."""
    run_until_stopped(recipe, validations=1)
    run_until_stopped(recipe, steps=1)
    folder = Path(recipe.output)
    sizes = {name: len(data) for name, data in content(folder).items()}
    sizes["checkpoint"] = (newest_checkpoint(folder) / "rank-00000.safetensors").stat().st_size
    assert sizes["metrics.jsonl"] < sizes["model.safetensors"] < sizes["checkpoint"]
    return sizes


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = read_state(first)[0], read_state(second)[0]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("file", ["checkpoint", "model.safetensors", "metrics.jsonl"])
def test_a_full_disk_is_one_error_and_nothing_is_lost(pairs: Pairs, output: Path, tmp_path: Path, file: str) -> None:
    recipe = tiny_recipe(pairs, output, **CHANGES)
    sizes = stopped_at_the_first_validation(recipe)
    before = content(output), files_of_checkpoints(output)
    trainer = Trainer(recipe)
    limit = sizes[file] + 10 if file == "metrics.jsonl" else sizes[file] - 500
    with largest_file(limit), pytest.raises(WriteError) as error:
        trainer.run()
    message = str(error.value)
    assert file in message
    assert "free some space" in message
    assert "\n" not in message
    after = content(output), files_of_checkpoints(output)
    assert after[1] == before[1]
    if file != "checkpoint":
        assert after[0]["model.safetensors"] == before[0]["model.safetensors"]
    assert not [name for name in after[0] if "partial" in name]
    opencoca.load(output)
    train(recipe)  # and on, once there is space
    assert_same_weights(output, train(tiny_recipe(pairs, tmp_path / "whole", **CHANGES)))


@pytest.mark.parametrize("in_background", [True, False])
def test_a_full_disk_may_be_waited_out(pairs: Pairs, output: Path, tmp_path: Path, in_background: bool) -> None:
    changes = CHANGES | {"checkpoint__when_unwritable": "continue", "checkpoint__in_background": in_background}
    recipe = tiny_recipe(pairs, output, **changes)
    sizes = stopped_at_the_first_validation(recipe)
    trainer, allowed = Trainer(recipe), largest_file(sizes["checkpoint"] - 500)
    trainer.validator = AfterCall(trainer.validator, {2}, lambda: allowed.__exit__(None, None, None))  # pyright: ignore
    allowed.__enter__()
    with pytest.warns(UserWarning, match="cannot write .*checkpoints.*training continues without this checkpoint"):
        trainer.run()
    whole = train(tiny_recipe(pairs, tmp_path / "whole", **changes))
    assert_same_weights(output, whole)
    assert read_lines(output) == read_lines(whole)


def test_the_average_is_swapped_back_when_saving_fails(pairs: Pairs, output: Path) -> None:
    trainer = Trainer(tiny_recipe(pairs, output, optimizer__ema_decay=0.9))
    assert trainer.average is not None
    with largest_file(20_000), pytest.raises(WriteError):
        trainer.run()
    reference = Trainer(tiny_recipe(pairs, output.with_name("other"), optimizer__ema_decay=0.9))
    reference.validator = None
    run_two_steps(reference)
    for name, parameter in reference.model.named_parameters():
        assert torch.equal(parameter, dict(trainer.model.named_parameters())[name])


def run_two_steps(trainer: Trainer) -> None:
    trainer.model.train()
    supply = trainer.batches.iterate(0)
    for step in range(2):
        trainer.step(next(supply), step, trainer.total_steps)
