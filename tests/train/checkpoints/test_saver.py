"""Whatever happens while a state is saved, the one before is there; whatever is damaged is noticed."""

import errno
import json
import os
import pickle
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opencoca.system.files import WriteError
from opencoca.train.checkpoints import shard_file

from ..helpers import flip_bit
from .faults import Died, Faults
from .states import checkpoints, equal, everything, make_state, resumed, save, take_steps


class Attempts:
    """The third save of a run, which also prunes, again and again: each in a folder of its own with the first two."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.tmp_path, self.monkeypatch, self.state = tmp_path, monkeypatch, make_state()
        for _ in range(2):
            take_steps(self.state)
            save(tmp_path / "first", self.state)
        self.before = everything(self.state)
        take_steps(self.state)
        self.after = everything(self.state)
        log = self.attempt("count", None, None)[1]
        assert {"mkdir", "open", "write", "fsync", "rename", "replace", "rmdir"} <= set(log)
        self.operations = range(1, len(log) + 1)

    def attempt(self, name: str, number: int | None, error: BaseException | None) -> tuple[Path, list[str]]:
        """Saves where operation ``number`` fails. Returns the folder, and which operations there were."""
        folder = self.tmp_path / name
        shutil.copytree(self.tmp_path / "first", folder)
        with self.monkeypatch.context() as patch:
            faults = Faults(patch, number, error)
            torch.set_rng_state(self.after["random"])
            save(folder, self.state)
        return folder, faults.log


def test_an_error_at_any_operation_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts, failed = Attempts(tmp_path, monkeypatch), 0
    for number in attempts.operations:
        code = (errno.ENOSPC, errno.EROFS, errno.EIO)[number % 3]
        folder, error = tmp_path / str(number), None
        try:
            attempts.attempt(str(number), number, OSError(code, os.strerror(code)))
        except WriteError as raised:
            error = raised
        expected = [attempts.after]
        if error is not None:
            assert error.errno == code
            assert str(folder) in str(error)
            assert "what was there before is unchanged" in str(error)
            expected.append(attempts.before)  # it may be all there, and only not in ``latest``
            failed += 1
        assert any(equal(resumed(folder), known) for known in expected)
        torch.set_rng_state(attempts.after["random"])
        save(folder, attempts.state)  # once there is space
        assert equal(resumed(folder), attempts.after)
        assert not list(folder.rglob("*.partial"))
    assert failed > 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_death_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts, outcomes = Attempts(tmp_path, monkeypatch), []
    for number in attempts.operations:
        folder, _ = attempts.attempt(str(number), number, Died())
        found = resumed(folder)
        outcomes.append("after" if equal(found, attempts.after) else "before")
        assert outcomes[-1] == "after" or equal(found, attempts.before)
        continued, saver = make_state(1), checkpoints(folder)
        saver.resume(continued)
        take_steps(continued)
        expected = everything(continued)
        saver.save(continued)
        saver.finish()
        assert equal(resumed(folder), expected)
        assert not list(folder.rglob("*.partial"))
    assert set(outcomes) == {"before", "after"}
    assert outcomes == sorted(outcomes, reverse=True)  # there is one moment from which on the new one counts


def test_death_in_the_very_first_save_leaves_nothing_to_trip_over(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / ".step-00000001.abc-1.partial"
    partial.mkdir(parents=True)
    (partial / "rank-00000.safetensors").write_bytes(b"half")
    assert not checkpoints(tmp_path).exist()
    assert resumed(tmp_path) is None
    assert not partial.exists()


class TestDamage:
    @pytest.fixture
    def two(self, tmp_path: Path) -> list[dict[str, torch.Tensor]]:
        """Two checkpoints in tmp_path, of steps 1 and 3; what they hold."""
        state, found = make_state(), []
        for steps in (1, 2):
            take_steps(state, steps)
            save(tmp_path, state)
            found.append(everything(state))
        return found

    @pytest.mark.parametrize("file", ["rank-00000.safetensors", "index.json"])
    @pytest.mark.parametrize("place", [0, 0.3, 0.6, 0.99])
    def test_a_flipped_bit_means_the_one_before(self, tmp_path: Path, two: list, file: str, place: float) -> None:
        path = tmp_path / "checkpoints" / "step-00000003" / file
        flip_bit(path, int(place * path.stat().st_size))
        with pytest.warns(
            UserWarning, match=rf"step-00000003/{file} is damaged.*continuing from the checkpoint before"
        ):
            assert equal(resumed(tmp_path), two[0])

    def test_a_lost_or_cut_file_means_the_one_before(self, tmp_path: Path, two: list) -> None:
        path = tmp_path / "checkpoints" / "step-00000003" / "rank-00000.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.warns(UserWarning, match="is damaged"):
            assert equal(resumed(tmp_path), two[0])
        path.unlink()
        with pytest.warns(UserWarning, match="cannot be read"):
            assert equal(resumed(tmp_path), two[0])

    def test_a_lost_or_damaged_latest_means_the_newest(self, tmp_path: Path, two: list) -> None:
        latest = tmp_path / "checkpoints" / "latest"
        flip_bit(latest, 12)
        assert equal(resumed(tmp_path), two[1])
        latest.unlink()
        assert equal(resumed(tmp_path), two[1])

    def test_latest_may_be_pointed_to_an_earlier_one(self, tmp_path: Path, two: list) -> None:
        (tmp_path / "checkpoints" / "latest").write_text("step-00000001")
        assert equal(resumed(tmp_path), two[0])
        # Continuing from there leaves what came after it behind.
        state = make_state()
        saver = checkpoints(tmp_path)
        saver.resume(state)
        take_steps(state)
        saver.save(state)
        saver.finish()
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == ["latest", "step-00000001", "step-00000002"]

    def test_if_all_are_damaged_nothing_begins_anew_by_itself(self, tmp_path: Path, two: list) -> None:
        for path in (tmp_path / "checkpoints").glob("*/rank*"):
            flip_bit(path)
        with (
            pytest.warns(UserWarning, match="step-00000003"),
            pytest.raises(ValueError, match=r"step-00000003/rank.*damaged.*restore it from a copy, or delete .*anew"),
        ):
            resumed(tmp_path)

    def test_parameters_that_are_not_finite_mean_the_one_before(self, tmp_path: Path) -> None:
        state = make_state()
        take_steps(state)
        save(tmp_path, state)
        before = everything(state)
        take_steps(state)
        with torch.no_grad():
            next(state.model.parameters())[2, 3] = float("inf")
        save(tmp_path, state)
        with pytest.warns(UserWarning, match=r"step-00000002 holds a 0\.weight that is not finite"):
            assert equal(resumed(tmp_path), before)

    def test_a_checkpoint_of_another_model_is_an_error(self, tmp_path: Path, two: list) -> None:
        state = make_state()
        assert isinstance(state.model, torch.nn.Sequential)
        state.model[0] = torch.nn.Linear(5, 8)
        with pytest.raises(ValueError, match=r"step-00000003 does not fit .*model/0\.weight has the shape \(7, 5\)"):
            checkpoints(tmp_path).resume(state)
        state = make_state()
        state.model.add_module("more", torch.nn.Linear(1, 1))
        with pytest.raises(ValueError, match=r"does not fit .*'model/more\.weight'"):
            checkpoints(tmp_path).resume(state)
        state = make_state()
        state.optimizer.param_groups[0]["params"].pop()
        with pytest.raises(ValueError, match="is not trained"):
            checkpoints(tmp_path).resume(state)


class TestBackground:
    def test_training_goes_on_while_the_disk_is_slow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gate, real = threading.Event(), shard_file.os.fsync

        def slow(descriptor: int) -> None:
            assert gate.wait(20)
            real(descriptor)

        monkeypatch.setattr(shard_file.os, "fsync", slow)
        state, saver = make_state(), checkpoints(tmp_path)
        take_steps(state)
        expected = everything(state)
        saver.save(state)  # returns at once
        take_steps(state, 3)  # and may change everything
        state.progress["window"]["rows"].clear()
        assert not checkpoints(tmp_path).exist()
        gate.set()
        saver.finish()
        assert equal(resumed(tmp_path), expected)

    def test_one_save_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        running, most = [], []

        def watched(*args: Any) -> Any:
            running.append(1)
            most.append(len(running))
            try:
                return real(*args)
            finally:
                running.pop()

        real = shard_file.write_shard
        monkeypatch.setattr("opencoca.train.checkpoints.saver.write_shard", watched)
        state, saver = make_state(), checkpoints(tmp_path, keep_last=9)
        for _ in range(4):
            take_steps(state)
            saver.save(state)
        saver.finish()
        assert most == [1] * 4
        assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 4

    def test_an_error_of_the_writer_surfaces_once(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").write_text("in the way")
        state, saver = make_state(), checkpoints(tmp_path)
        take_steps(state)
        saver.save(state)
        saver.close()
        assert saver.has_failed
        with pytest.raises(WriteError, match=r"checkpoints.*a part of its path is a file; choose another folder"):
            saver.finish()
        assert not saver.has_failed
        saver.finish()
        (tmp_path / "checkpoints").unlink()
        saver.save(state)
        saver.finish()
        assert equal(resumed(tmp_path), everything(state))

    def test_another_error_keeps_its_words(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise MemoryError("too much")

        monkeypatch.setattr("opencoca.train.checkpoints.saver.write_shard", fail)
        saver = checkpoints(tmp_path)
        saver.save(make_state())
        with pytest.raises(RuntimeError, match="too much"):
            saver.finish()


class TestRandomStates:
    def test_all_generators_continue(self, tmp_path: Path) -> None:
        state = make_state()
        take_steps(state)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        for draw_some in (lambda: random.gauss(0, 1), lambda: np.random.randn(3), lambda: torch.randn(3)):  # noqa: NPY002
            draw_some()
        save(tmp_path, state)

        def draw() -> list[float]:
            drawn = [random.gauss(0, 1), random.random(), float(torch.randn(()))]
            return drawn + np.random.randn(3).tolist() + [np.random.rand()]  # noqa: NPY002

        expected = draw()
        draw()
        checkpoints(tmp_path).resume(make_state())
        assert draw() == expected


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state()
    take_steps(state)
    save(tmp_path, state)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    assert equal(resumed(tmp_path), everything(state))
    assert {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == {
        "",
        ".json",
        ".safetensors",
    }


class TestSingleFile:
    """What earlier versions left."""

    @pytest.fixture
    def stored(self, tmp_path: Path) -> dict[str, torch.Tensor]:
        state = make_state()
        take_steps(state, 2)
        assert state.average is not None
        names = {id(parameter): name for name, parameter in state.model.named_parameters()}
        tensors = {f"model/{name}": tensor.detach().clone() for name, tensor in state.model.state_dict().items()}
        tensors |= {f"average/{name}": tensor.clone() for name, tensor in state.average.state().items()}
        for parameter, values in state.optimizer.state.items():
            tensors |= {f"optimizer/{slot}/{names[id(parameter)]}": value for slot, value in values.items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        header = {"progress": state.progress, "average_updates": state.average.updates}
        save_file(tensors, tmp_path / "last.safetensors", {"opencoca": json.dumps(header)})
        return everything(state)

    def test_is_continued_from(self, tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
        assert checkpoints(tmp_path).exist()
        assert equal(resumed(tmp_path), stored)

    def test_goes_once_there_are_enough_checkpoints(self, tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
        state, saver = make_state(), checkpoints(tmp_path)
        saver.resume(state)
        for there_is in (True, False):
            take_steps(state)
            saver.save(state)
            saver.finish()
            assert (tmp_path / "last.safetensors").exists() == there_is

    @pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
    def test_is_refused_if_it_is_cut(self, tmp_path: Path, stored: dict[str, torch.Tensor], keep: float) -> None:
        path = tmp_path / "last.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        with pytest.raises(ValueError, match=r"last\.safetensors is damaged"):
            resumed(tmp_path)

    @pytest.mark.parametrize("damage", [b"", b"\0" * 64, b"not a checkpoint at all", b"\xff" * 4096])
    def test_something_else_is_refused(self, tmp_path: Path, damage: bytes) -> None:
        (tmp_path / "last.safetensors").write_bytes(damage)
        with pytest.raises(ValueError, match=r"last\.safetensors is damaged.*delete"):
            resumed(tmp_path)

    def test_a_models_file_is_refused(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "last.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="not the state of a training run"):
            resumed(tmp_path)
