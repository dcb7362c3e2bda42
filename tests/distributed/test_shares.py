"""Processes share out initial weights, validation and similarities, and nothing that comes of it changes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opencoca.distributed.world import World
from opencoca.train import load_recipe
from processes import run_ranks
from train.helpers import tiny_recipe, write_pairs

from .shares import CHUNK_ROWS, EMBED_DIM, ROWS, begin, take_shares

pytestmark = pytest.mark.distributed

SIZE = 2
STRATEGIES = ("ddp", "fsdp")
Found = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found, and the recipe that they followed: 120 images, of which one cannot be read."""
    folder = tmp_path_factory.mktemp("shares")
    pairs = write_pairs(folder, count=120, captions_per_image=2)
    (pairs.images / "image70.png").write_bytes(b"no image")
    tiny_recipe(pairs, folder / "run", model__image__depth=2, data__max_bad_share=0.1)
    run_ranks(SIZE, take_shares, folder, folder / "run.yaml", STRATEGIES, folder=folder, timeout_s=900)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    """The same of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return begin(load_recipe(folder / "run.yaml"), World())
    finally:
        torch.set_num_threads(threads)


def ranks(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name} {rank}.pt", weights_only=True) for rank in range(SIZE)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_initial_weights_are_those_of_one_process(strategy: str, folder: Path, alone: Found) -> None:
    for found in ranks(folder, strategy):
        assert found["weights"].keys() == alone["weights"].keys()
        assert all(torch.equal(found["weights"][name], whole) for name, whole in alone["weights"].items())


def test_no_rank_holds_the_whole_sharded_model(folder: Path, alone: Found) -> None:
    held = [found["elements"] for found in ranks(folder, "fsdp")]
    assert alone["elements"] <= sum(held) <= 1.02 * alone["elements"]
    assert max(held) < 0.52 * alone["elements"]
    assert [found["elements_before_sharding"] for found in ranks(folder, "fsdp")] == [0] * SIZE
    assert [found["elements"] for found in ranks(folder, "ddp")] == [alone["elements"]] * SIZE


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shared_validation_gives_the_scores_of_one_process(strategy: str, folder: Path, alone: Found) -> None:
    first, second = ranks(folder, strategy)
    assert first["scores"] == alone["scores"]
    assert first["captions"] == alone["captions"]
    assert second["scores"] is None
    assert (first["validated_images"], second["validated_images"]) == (50, 69)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_that_one_rank_gives_up_is_given_up(strategy: str, folder: Path) -> None:
    assert all(found["given_up"] for found in ranks(folder, strategy))


def test_no_rank_makes_the_similarities_of_its_batch_at_once(folder: Path) -> None:
    for elements in ranks(folder, "loss"):
        assert elements <= max(CHUNK_ROWS * ROWS, ROWS * EMBED_DIM) < ROWS // SIZE * ROWS
