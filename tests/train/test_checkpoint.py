"""Checkpoints are whole or refused, and a full disk costs nothing that was saved before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import opencoca
from opencoca.files import WriteError
from opencoca.train import train
from opencoca.train.checkpoint import load_checkpoint, save_checkpoint
from opencoca.train.trainer import Trainer

from .helpers import Pairs, content, largest_file, read_tensors, run_until_stopped, tiny_recipe


@pytest.fixture
def trainer(pairs: Pairs, output: Path) -> Trainer:
    """A run of 4 steps, stopped after the first, begun again."""
    recipe = tiny_recipe(pairs, output, optimizer__ema_decay=0.9)
    run_until_stopped(recipe, steps=1)
    return Trainer(recipe)


def rewrite(path: Path, **replaced: torch.Tensor | None) -> None:
    """Stores the checkpoint again with other tensors; None leaves one out. Double underscores stand for slashes."""
    tensors, metadata = read_tensors(path)
    for key, tensor in replaced.items():
        del tensors[key.replace("__", "/")]
        if tensor is not None:
            tensors[key.replace("__", "/")] = tensor
    save_file(tensors, path, metadata)


def test_saving_and_loading_changes_nothing(trainer: Trainer, tmp_path: Path) -> None:
    load_checkpoint(trainer.checkpoint_path, trainer.state)
    save_checkpoint(tmp_path / "copy.safetensors", trainer.state)
    ours, metadata = read_tensors(trainer.checkpoint_path)
    theirs, copied = read_tensors(tmp_path / "copy.safetensors")
    assert metadata == copied
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    for name in trained:
        assert {f"{part}/{name}" for part in ("model", "average", "optimizer/exp_avg", "optimizer/step")} <= ours.keys()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99, -1])
def test_a_truncated_checkpoint_is_refused(trainer: Trainer, keep: float) -> None:
    path = trainer.checkpoint_path
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"last\.safetensors is damaged"):
        trainer.run()


@pytest.mark.parametrize("damage", [b"", b"\0" * 64, b"not a checkpoint at all", b"\xff" * 4096])
def test_a_file_of_something_else_is_refused(trainer: Trainer, damage: bytes) -> None:
    trainer.checkpoint_path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"last\.safetensors is damaged or not one of a training run.*delete it"):
        trainer.run()


def test_the_models_own_file_is_no_checkpoint(pairs: Pairs, output: Path) -> None:
    recipe = tiny_recipe(pairs, output, epochs=1)
    train(recipe)
    (output / "last.safetensors").write_bytes((output / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="not one of a training run"):
        train(recipe)


@pytest.mark.parametrize(
    "replaced",
    [
        {"model__log_logit_scale": None},
        {"average__log_logit_scale": None},
        {"rng__cpu": None},
        {"model__image_proj.weight": torch.zeros(1, 1)},
        {"model__image_proj.weight": torch.zeros(24, 31)},
        {"average__image_proj.weight": torch.zeros(24, 31)},
        {"optimizer__exp_avg__image_proj.weight": torch.zeros(24, 31)},
        {"optimizer__exp_avg__image_proj.weight": None},
        {"rng__cpu": torch.zeros(3)},
    ],
    ids=lambda replaced: "-".join(
        f"{key}{'' if value is None else list(value.shape)}" for key, value in replaced.items()
    ),
)
def test_a_checkpoint_that_does_not_fit_is_refused(trainer: Trainer, replaced: dict[str, Any]) -> None:
    rewrite(trainer.checkpoint_path, **replaced)
    with pytest.raises(ValueError, match=r"last\.safetensors does not fit"):
        trainer.run()


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_a_truncated_model_is_refused(pairs: Pairs, output: Path, keep: float) -> None:
    train(tiny_recipe(pairs, output, epochs=1))
    path = output / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        opencoca.load(output)


@pytest.mark.parametrize("file", ["last.safetensors", "model.safetensors", "metrics.jsonl"])
def test_a_full_disk_is_one_error_and_nothing_is_lost(pairs: Pairs, output: Path, tmp_path: Path, file: str) -> None:
    changes = {"optimizer__ema_decay": 0.9, "epochs": 3, "log_every_steps": 1, "select_by": "loss"}
    recipe = tiny_recipe(pairs, output, **changes)
    run_until_stopped(recipe, validations=1)
    sizes = {name: len(data) for name, data in content(output).items()}
    assert sizes["metrics.jsonl"] < sizes["model.safetensors"] < sizes["last.safetensors"]
    before = content(output)
    trainer = Trainer(recipe)
    # A later checkpoint may be some digits shorter: its header holds times and scores.
    limit = sizes[file] + 10 if file == "metrics.jsonl" else sizes[file] - 500
    with largest_file(limit), pytest.raises(WriteError) as error:
        trainer.run()
    message = str(error.value)
    assert file in message
    assert "free some space" in message
    assert "\n" not in message
    after = content(output)
    for name in ("last.safetensors", "model.safetensors") if file != "last.safetensors" else ("last.safetensors",):
        assert after[name] == before[name]
    assert not [name for name in after if "partial" in name]
    opencoca.load(output)
    train(recipe)  # and on, once there is space
    whole = train(tiny_recipe(pairs, tmp_path / "whole", **changes))
    ours, theirs = read_tensors(output / "last.safetensors")[0], read_tensors(whole / "last.safetensors")[0]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


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


def test_nothing_in_a_checkpoint_can_run_code(trainer: Trainer) -> None:
    data = trainer.checkpoint_path.read_bytes()
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    assert "__metadata__" in header  # safetensors: a JSON header and plain numbers after it
    assert header["__metadata__"].keys() == {"opencoca"}
