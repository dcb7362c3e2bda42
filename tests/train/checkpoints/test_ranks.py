"""A state that several processes hold is saved by all, and read back by any number of them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.cases import Case, make_batch, make_model, make_recipe
from distributed.conftest import run_ranks
from opencoca.distributed import World, full_tensor, join_world
from opencoca.train.checkpoints import Checkpoints, TrainState
from opencoca.train.optimizer import WeightAverage, build_optimizer
from opencoca.train.parallel import ParallelModel
from opencoca.train.recipe_safety import CheckpointRecipe
from opencoca.train.step import TrainStep

from ..helpers import flip_bit
from .states import Everything, equal

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:.*is damaged:UserWarning")]
CASE = Case()
WAYS = {"none": 1, "ddp": 2, "fsdp": 3, "fsdp:2": 4}


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
        whole = {name: full_tensor(tensor.detach()).clone() for name, tensor in found.items()}
        return whole | {"updates": torch.tensor([self.state.average.updates, self.state.progress["step"]])}


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


def main(action: str, way: str, *folders: str) -> None:
    """save WAY FOLDER, or resume WAY FOLDER RESULTS [FOLDER RESULTS ...]."""
    torch.set_num_threads(1)
    paths = [Path(folder) for folder in folders]
    with join_world() as world:
        if action == "save":
            save_some(paths[0], world, way)
        else:
            for folder, out in zip(paths[::2], paths[1::2], strict=True):
                resume(folder, out, world, way)


def run_program(action: str, way: str, *folders: Path) -> None:
    if WAYS[way] == 1:
        main(action, way, *map(str, folders))
    else:
        run_ranks(WAYS[way], ["-m", "train.checkpoints.test_ranks", action, way, *map(str, folders)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of runs that differ in their processes, and one with a damaged file."""
    folders = {}
    for way in WAYS:
        folders[way] = tmp_path_factory.mktemp("saved")
        run_program("save", way, folders[way])
    folders["damaged"] = tmp_path_factory.mktemp("saved") / "run"
    shutil.copytree(folders["fsdp"], folders["damaged"])
    flip_bit(folders["damaged"] / "checkpoints" / "step-00000002" / "rank-00001.safetensors")
    return folders


@pytest.fixture(scope="module")
def continued(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[Any]]:
    """What every process found that continued, in some way, what was saved in another; computed once a way."""
    known: dict[str, Path] = {}

    def get(writer: str, way: str) -> list[Any]:
        if way not in known:
            known[way] = tmp_path_factory.mktemp("continued")
            pairs = [(folder, known[way] / name) for name, folder in saved.items()]
            for _, out in pairs:
                out.mkdir()
            run_program("resume", way, *(path for pair in pairs for path in pair))
        return [torch.load(known[way] / writer / f"{rank}.pt", weights_only=True) for rank in range(WAYS[way])]

    return get


def contents(folder: Path, step: int) -> Everything:
    return torch.load(folder / f"step {step} 0.pt", weights_only=True)


def test_every_process_writes_its_share(saved: dict[str, Path]) -> None:
    totals = {}
    for way, size in WAYS.items():
        sizes = [path.stat().st_size for path in (saved[way] / "checkpoints" / "step-00000002").glob("rank-*")]
        assert len(sizes) == size
        assert min(sizes) > 0.6 * max(sizes)
        totals[way] = sum(sizes) - size * 30_000  # each has a header and random states of its own
    assert all(totals[way] <= totals["none"] + 30_000 for way in WAYS)  # nothing is written twice


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("writer", WAYS)
def test_any_number_of_processes_continues(
    saved: dict[str, Path], continued: Callable[[str, str], list[Any]], writer: str, way: str
) -> None:
    for rank, result in enumerate(continued(writer, way)):
        assert result["step"] == 2
        assert equal(result["found"], contents(saved[writer], 2))
        if writer == way:
            assert equal(result["next"], contents(saved[writer], 3))
        if rank < WAYS[writer]:
            torch.manual_seed(200 + rank)
            assert result["drawn"] == torch.randint(1 << 40, ())


@pytest.mark.parametrize("way", WAYS)
def test_one_damaged_file_of_several_means_the_one_before_for_all(
    saved: dict[str, Path], continued: Callable[[str, str], list[Any]], way: str
) -> None:
    for result in continued("damaged", way):
        assert result["step"] == 1
        assert equal(result["found"], contents(saved["fsdp"], 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
