"""However a process leaves the others, nothing of the group is left behind: what is aborts the process as it exits."""

import threading
import time

import pytest
import torch.distributed as dist

from opencoca.distributed import world as distributed
from opencoca.distributed.world import join_world
from processes import free_port


@pytest.fixture
def alone_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("alone_in_a_group")
def test_no_group_is_left_after_the_work() -> None:
    with join_world() as world:
        assert dist.is_initialized()
        assert (world.rank, world.size) == (0, 1)
    assert not dist.is_initialized()


@pytest.mark.usefixtures("alone_in_a_group")
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_no_group_is_left_after_a_failure(error: type[BaseException]) -> None:
    with pytest.raises(error), join_world():
        raise error
    assert not dist.is_initialized()


@pytest.mark.usefixtures("alone_in_a_group")
def test_others_who_do_not_answer_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parting may wait for those that wait for this process; the failure is told all the same."""
    answered, destroy = threading.Event(), dist.destroy_process_group

    def wait_for_others() -> None:
        answered.wait(60)
        destroy()

    monkeypatch.setattr(distributed, "_PARTING_S", 0.01)
    monkeypatch.setattr(dist, "destroy_process_group", wait_for_others)
    with pytest.raises(ValueError, match="one rank's"), join_world():
        raise ValueError("one rank's")
    assert dist.is_initialized()
    answered.set()
    deadline = time.monotonic() + 60
    while dist.is_initialized() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not dist.is_initialized()
