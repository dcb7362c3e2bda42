"""`opencoca train` as several processes: the same run as one, stopped and continued with another strategy."""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from opencoca.store.model_folder import load_model_folder
from opencoca.train import load_recipe, train
from processes import finish, start_ranks
from train.helpers import Pairs, merged, tiny_values, write_pairs

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return write_pairs(tmp_path_factory.mktemp("pairs"), count=10, captions_per_image=3)


def write_recipe(pairs: Pairs, output: Path, **changes: Any) -> Path:
    values = merged(tiny_values(pairs, output), {key.replace("__", "."): value for key, value in changes.items()})
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def command(*arguments: str) -> None:
    """``python -m opencoca ARGUMENTS``, without the drawing of a report, which takes longer than the tiny run."""
    sys.argv[1:] = arguments
    with patch("opencoca.train.trainer.write_report", lambda *_: None):
        runpy.run_module("opencoca", run_name="__main__")


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def test_a_run_stopped_by_one_rank_and_continued_sharded_is_the_run_of_one_process(
    pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "epochs": 5,
        "log_every_steps": 1,
        "optimizer__ema_decay": 0.9,
        "data__captions_per_image": 2,
        "data__drop_last": False,
        "data__num_workers": 1,
        "accumulation_steps": 2,
        "validate_every_epochs": 2,
        "grad_cache_steps": 2,
    }
    monkeypatch.setattr("opencoca.train.trainer.write_report", lambda *_: None)
    train(load_recipe(write_recipe(pairs, tmp_path / "one", **changes)))
    expected = metrics(tmp_path / "one")

    recipe = write_recipe(pairs, tmp_path / "two", **changes)
    processes = start_ranks(2, command, "train", str(recipe), folder=tmp_path)
    while len(metrics(tmp_path / "two")) < 2 and processes[1].is_alive():
        time.sleep(0.005)
    assert processes[1].pid is not None
    os.killpg(processes[1].pid, signal.SIGTERM)  # its loader's worker gets it too
    codes, outputs = finish(processes, tmp_path)
    assert codes == [130, 130], "\n".join(outputs)
    assert "the same command continues from there" in outputs[0]
    assert outputs[1] == ""
    stopped = len(metrics(tmp_path / "two"))
    assert 2 <= stopped < len(expected)

    sharded = ("--distributed.strategy", "fsdp")
    codes, outputs = finish(start_ranks(2, command, "train", str(recipe), *sharded, folder=tmp_path), tmp_path)
    assert codes == [0, 0], "\n".join(outputs)
    assert "the trained model is in" in outputs[0]
    assert outputs[1] == ""
    found = metrics(tmp_path / "two")
    assert [(line["kind"], line["step"]) for line in found] == [(line["kind"], line["step"]) for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in {"loss", "caption_loss", "contrastive_loss", "epoch", "grad_norm", "lr"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (key, theirs["step"])
    assert load_model_folder(tmp_path / "two").model.config == load_model_folder(tmp_path / "one").model.config


def test_a_mistake_is_told_once(pairs: Pairs, tmp_path: Path) -> None:
    arguments = ("train", str(write_recipe(pairs, tmp_path / "run")), "--distributed.strategy", "none")
    codes, outputs = finish(start_ranks(2, command, *arguments, folder=tmp_path), tmp_path)
    assert codes == [2, 2]
    assert outputs[0].startswith("opencoca: there are 2 processes, but distributed.strategy is none")
    assert outputs[0].count("\n") == 1
    assert outputs[1] == ""


def test_what_one_rank_alone_lacks_ends_all(pairs: Pairs, tmp_path: Path) -> None:
    """As where a folder is missing on one machine: that machine says so, and the others do not wait for it."""
    missing = ("--data.train_images", str(tmp_path / "nowhere"))
    recipe = str(write_recipe(pairs, tmp_path / "run"))
    codes, outputs = finish(start_ranks(2, command, "train", recipe, folder=tmp_path, last=missing), tmp_path)
    assert codes == [2, 2]
    assert outputs[0] == ""
    assert "nowhere" in outputs[1]
