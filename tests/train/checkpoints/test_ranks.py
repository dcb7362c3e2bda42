"""A state that several processes hold is saved by all, and read back by any number of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.cases import Case, make_batch, make_model, make_recipe, whole
from opencoca.distributed.world import World, join_world
from opencoca.train.checkpoints import Checkpoints, TrainState
from opencoca.train.checkpoints.shard_file import ShardFile
from opencoca.train.optim.optimizer import WeightAverage, build_optimizer
from opencoca.train.parallel import ParallelModel
from opencoca.train.recipe.safety import CheckpointRecipe
from opencoca.train.step import TrainStep
from processes import run_ranks

from ..helpers import flip_bit
from .states import Everything, equal

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:.*is damaged:UserWarning")]
CASE = Case()
WAYS = {"none": 1, "ddp": 2, "fsdp": 3, "fsdp:2": 4}
SLOW = "fsdp:2"
FAST = [way for way in WAYS if way != SLOW]
PARAMETERS = [*FAST, pytest.param(SLOW, marks=pytest.mark.slow)]


class Run:
    """Steps of a tiny model by any number of processes."""

    def __init__(self, world: World, way: str):
        strategy, _, size = way.partition(":")
        recipe = make_recipe(CASE, strategy, int(size) if size else None)
        model = make_model(CASE, recipe)
        parallel = ParallelModel(model, torch.device("cpu"), recipe, world)
        average = WeightAverage(model, 0.9)
        self.world, self.state = world, TrainState(model, build_optimizer(model, recipe), average, {"step": 0})
        self.take = TrainStep(model, self.state.optimizer, average, recipe, parallel)

    def step(self) -> None:
        self.take(make_batch(CASE, self.world), self.state.progress["step"], 10)
        self.state.progress["step"] += 1

    def everything(self) -> Everything:
        """Whole tensors; all processes must call."""
        assert self.state.average is not None
        names = {id(parameter): name for name, parameter in self.state.model.named_parameters()}
        found = {f"model/{name}": tensor for name, tensor in self.state.model.named_parameters()}
        found |= {f"average/{name}": tensor for name, tensor in self.state.average.state().items()}
        for parameter, values in self.state.optimizer.state.items():
            found |= {f"{slot}/{names[id(parameter)]}": value for slot, value in values.items()}
        return whole(found) | {"updates": torch.tensor([self.state.average.updates, self.state.progress["step"]])}


def save_some(folder: Path, world: World, way: str) -> None:
    """Two checkpoints, and what is in them and what comes after."""
    run, checkpoints = Run(world, way), Checkpoints(folder, CheckpointRecipe(), world)
    for step in (1, 2):
        run.step()
        torch.manual_seed(100 * step + world.rank)
        checkpoints.save(run.state)
        torch.save(run.everything(), folder / f"step {step} {world.rank}.pt")
    checkpoints.finish()
    run.step()
    torch.save(run.everything(), folder / f"step 3 {world.rank}.pt")


def resume(folder: Path, out: Path, world: World, way: str) -> None:
    run, checkpoints = Run(world, way), Checkpoints(folder, CheckpointRecipe(), world)
    for _ in range(3):
        run.step()  # so that there is something to overwrite
    step = world.together(lambda: checkpoints.resume(run.state))
    drawn = torch.randint(1 << 40, ())
    found = run.everything()
    run.step()
    torch.save({"step": step, "found": found, "next": run.everything(), "drawn": drawn}, out / f"{world.rank}.pt")


def work(action: str, way: str, *folders: Path) -> None:
    """save WAY FOLDER, or resume WAY FOLDER RESULTS [FOLDER RESULTS ...]."""
    with join_world() as world:
        if action == "save":
            save_some(folders[0], world, way)
        else:
            for folder, out in zip(folders[::2], folders[1::2], strict=True):
                resume(folder, out, world, way)


def run_program(action: str, way: str, *folders: Path) -> None:
    if WAYS[way] == 1:
        work(action, way, *folders)
    else:
        run_ranks(WAYS[way], work, action, way, *folders, folder=folders[-1])


Saved = Callable[[str], Path]
Continued = Callable[[str, str], list[Any]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of a run by processes of some way, or, damaged, a copy of one with a flipped bit; made once."""
    known: dict[str, Path] = {}

    def get(way: str) -> Path:
        if way not in known:
            known[way] = tmp_path_factory.mktemp("saved") / "run"
            if way == "damaged":
                shutil.copytree(get("fsdp"), known[way])
                flip_bit(known[way] / "checkpoints" / "step-00000002" / "rank-00001.safetensors")
            else:
                known[way].mkdir()
                run_program("save", way, known[way])
        return known[way]

    return get


@pytest.fixture(scope="module")
def continued(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Continued:
    """What every process found that continued, in some way, what was saved in another; computed once a way."""
    known: dict[tuple[str, bool], Path] = {}

    def get(writer: str, way: str) -> list[Any]:
        all_writers = SLOW in (writer, way)
        writers = ["damaged", *(WAYS if all_writers else FAST)]
        if (way, all_writers) not in known:
            known[way, all_writers] = out = tmp_path_factory.mktemp("continued")
            for name in writers:
                (out / name).mkdir()
            run_program("resume", way, *(path for name in writers for path in (saved(name), out / name)))
        folder = known[way, all_writers] / writer
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WAYS[way])]

    return get


def contents(folder: Path, step: int) -> Everything:
    return torch.load(folder / f"step {step} 0.pt", weights_only=True)


def test_every_process_writes_its_share(saved: Saved) -> None:
    totals = {}
    for way in FAST:
        files = [ShardFile(path) for path in (saved(way) / "checkpoints" / "step-00000002").glob("rank-*")]
        assert len(files) == WAYS[way]
        shares = [sum(file.read(key).nbytes for key in file.keys if not key.startswith("random/")) for file in files]
        assert min(shares) > 0.7 * max(shares)
        totals[way] = sum(shares)
    assert len(set(totals.values())) == 1  # nothing is written twice


@pytest.mark.parametrize("way", PARAMETERS)
@pytest.mark.parametrize("writer", PARAMETERS)
def test_any_number_of_processes_continues(saved: Saved, continued: Continued, writer: str, way: str) -> None:
    for rank, result in enumerate(continued(writer, way)):
        assert result["step"] == 2
        assert equal(result["found"], contents(saved(writer), 2))
        if writer == way:
            assert equal(result["next"], contents(saved(writer), 3))
        if rank < WAYS[writer]:
            torch.manual_seed(200 + rank)
            assert result["drawn"] == torch.randint(1 << 40, ())


@pytest.mark.parametrize("way", PARAMETERS)
def test_one_damaged_file_of_several_means_the_one_before_for_all(saved: Saved, continued: Continued, way: str) -> None:
    for result in continued("damaged", way):
        assert result["step"] == 1
        assert equal(result["found"], contents(saved("fsdp"), 1))
