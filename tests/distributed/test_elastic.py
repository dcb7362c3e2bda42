"""Processes of one attempt agree on a name, whatever earlier attempts have left, and in whatever order they come."""

import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store  # pyright: ignore[reportPrivateImportUsage]

from opencoca.distributed.elastic import agree_on_attempt

PATIENCE = timedelta(seconds=30)


def attempt(store: Store, ranks: list[int], size: int, timeout: timedelta = PATIENCE) -> dict[int, object]:
    """What each of these gets; the later in the list, the later it comes."""
    found: dict[int, object] = {}

    def run(rank: int) -> None:
        try:
            found[rank] = agree_on_attempt(store, rank, size, timeout)
        except TimeoutError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("ranks", [[0], [0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_all_get_one_name_and_every_attempt_another(ranks: list[int]) -> None:
    store, names = HashStore(), set()
    for _ in range(3):
        found = attempt(store, ranks, len(ranks))
        assert len(set(found.values())) == 1
        names |= set(found.values())
    assert len(names) == 3


@pytest.mark.parametrize("died", [[1], [0], [0, 1], [1, 2], [0, 2]])
def test_what_dead_processes_left_misleads_nobody(died: list[int]) -> None:
    store = HashStore()
    for rank in died:  # each on its own, and of an attempt that was never complete
        attempt(store, [rank], 3, timedelta(seconds=0.1))
    found = attempt(store, [2, 0, 1], 3)
    assert len(set(found.values())) == 1
    again = attempt(store, [1, 2, 0], 3)
    assert len(set(again.values())) == 1
    assert again[0] != found[0]


def test_fewer_or_more_processes_than_before() -> None:
    store = HashStore()
    for size in (4, 2, 5, 1, 3):
        found = attempt(store, list(range(size)), size)
        assert len(set(found.values())) == 1


def test_those_who_wait_in_vain_say_so() -> None:
    found = attempt(HashStore(), [0], 2, timedelta(seconds=0.1))
    assert isinstance(found[0], TimeoutError)
