"""Losses and gradients of a step do not depend on how many processes share it, nor on how they share the weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from opencoca.distributed.world import World
from opencoca.train.parallel import check_processes

from .cases import CASES, DECAY_OF_FIRST_UPDATE, make_batch, make_recipe, take_step
from .conftest import Results

pytestmark = pytest.mark.distributed

FP32 = [name for name in CASES if name != "bf16"]
# Of sharded weights in two processes: what the other cases show together, or four processes do.
SLOW = tuple(
    f"fsdp {name}"
    for name in ("accumulated", "uneven", "three images", "cached", "cached and uneven", "sums", "contrastive alone")
)
RUNS: dict[int, tuple[str, ...]] = {
    2: (
        *(f"ddp {name}" for name in FP32),
        *(f"fsdp {name}" for name in CASES if f"fsdp {name}" not in SLOW),
        "ddp bad",
        "fsdp bad",
    ),
    4: (
        "ddp uneven",
        "ddp three images",
        "ddp cached and accumulated",
        "fsdp three images",
        "fsdp cached and accumulated",
        "fsdp:2 three images",
        "fsdp:2 cached and accumulated",
        "fsdp:2 clipped",
        "fsdp bad",
    ),
}
ONE_RANK = ("ddp plain", "fsdp plain", "fsdp cached and accumulated")
EQUAL = [(size, name) for size, names in RUNS.items() for name in names if not name.endswith(("bad", "bf16"))]
EQUAL += [pytest.param(2, name, marks=pytest.mark.slow) for name in SLOW]
Taken = dict[str, Tensor]
FindRanks = Callable[[int, str], list[Taken]]


@pytest.fixture(scope="module")
def ranks_of(results_of: Callable[[int, tuple[str, ...]], Results]) -> FindRanks:
    """What each of ``size`` processes found in a case; the processes take all cases of their number one by one."""
    return lambda size, name: results_of(size, RUNS[size] if name in RUNS[size] else SLOW)[name]


@pytest.fixture(scope="module")
def alone() -> Callable[[str], Taken]:
    """The same step in one process."""
    known: dict[str, Taken] = {}

    def step(case: str) -> Taken:
        if case not in known:
            known[case] = take_step(CASES[case], World())
        return known[case]

    return step


def assert_close(found: Taken, expected: Taken, kind: str, tolerance: float) -> None:
    """Within ``tolerance`` of the largest value there is, or of 1."""
    names = [name for name in expected if name.startswith(kind)]
    assert names
    assert names == [name for name in found if name.startswith(kind)]
    largest = max(1.0, *(float(expected[name].abs().max()) for name in names))
    for name in names:
        difference = float((found[name].double() - expected[name].double()).abs().max())
        assert difference <= tolerance * largest, f"{name} differs by {difference}"


@pytest.mark.parametrize(("size", "name"), EQUAL)
def test_every_rank_has_the_losses_and_gradients_of_one_process(
    size: int, name: str, ranks_of: FindRanks, alone: Callable[[str], Taken]
) -> None:
    case = name.partition(" ")[2]
    tolerance = 1e-12 if CASES[case].double else 1e-6
    for found in ranks_of(size, name):
        assert_close(found, alone(case), "gradient/", tolerance)
        assert_close(found, alone(case), "metric/", tolerance)


@pytest.mark.parametrize(("size", "name"), EQUAL)
def test_all_ranks_end_with_the_same_weights_and_averages(size: int, name: str, ranks_of: FindRanks) -> None:
    first, *others = ranks_of(size, name)
    for kind in ("parameter/", "average/"):
        names = [key for key in first if key.startswith(kind)]
        assert names
        assert all(torch.equal(first[key], other[key]) for key in names for other in others)
    for key in (key for key in first if key.startswith("average/")):
        own = key.removeprefix("average/")
        expected = first[f"before/{own}"].lerp(first[f"parameter/{own}"], 1 - DECAY_OF_FIRST_UPDATE)
        assert torch.allclose(first[key], expected, atol=1e-6), key
        # The main rank holds all of it in one piece, and it alone (but for copies that each has anyway).
        assert torch.equal(first[f"gathered/{own}"], first[key])
    assert not any(key.startswith("gathered/") for other in others for key in other)


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_is_one_process(name: str, tmp_path: Path, alone: Callable[[str], Taken]) -> None:
    strategy, _, case = name.partition(" ")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        found = take_step(CASES[case], World(), strategy)
    finally:
        dist.destroy_process_group()
    assert_close(found, alone(case), "gradient/", 1e-6)
    assert_close(found, alone(case), "metric/", 1e-6)


@pytest.mark.parametrize("name", ["fsdp bf16"])
def test_low_precision_blocks_cost_no_more_than_autocast_does(
    name: str, ranks_of: FindRanks, alone: Callable[[str], Taken]
) -> None:
    exact, rounded = alone("plain"), alone("bf16")
    found = ranks_of(2, name)[0]

    def error(taken: Taken) -> float:
        names = [key for key in exact if key.startswith("gradient/")]
        return float(sum((taken[key] - exact[key]).square().sum() for key in names)) ** 0.5

    assert error(found) < 2 * error(rounded)
    assert abs(found["metric/loss"] - exact["metric/loss"]) < 0.02 * exact["metric/loss"]


@pytest.mark.parametrize(("size", "name"), [(2, "ddp bad"), (2, "fsdp bad"), (4, "fsdp bad")])
def test_a_nan_on_one_rank_stops_all_before_anything_changes(size: int, name: str, ranks_of: FindRanks) -> None:
    ranks = ranks_of(size, name)
    for rank in ranks:
        assert rank["noticed"]
        assert rank["changed"] == 0
        assert torch.isfinite(rank["next"])  # nothing of it is left over
    assert len({float(rank["next"]) for rank in ranks}) == 1


def test_shards_must_fit_the_number_of_processes() -> None:
    recipe = make_recipe(CASES["plain"], "fsdp", shard_size=3)
    with pytest.raises(ValueError, match=r"distributed\.shard_size 3 must divide .* which is 4"):
        check_processes(recipe, World(0, 4))
    check_processes(recipe, World(0, 6))


def test_the_cases_are_uneven() -> None:
    """Or what is shown above would be shown of equal shares alone."""
    shares = [make_batch(CASES["three images"], World(rank, 4)) for rank in range(4)]
    assert sorted(len(share.sample_ids) for share in shares) == [0, 1, 1, 1]
    words = [make_batch(CASES["plain"], World(rank, 2)).num_tokens for rank in range(2)]
    assert words[0] != words[1]
    ids = [set(make_batch(CASES["plain"], World(rank, 2)).sample_ids.tolist()) for rank in range(2)]
    assert ids[0] & ids[1]
