"""A meeting place for processes that torchrun starts again, in which nothing of an earlier attempt is found.

torchrun keeps one store of keys for all attempts (pytorch/pytorch issue 135712). Processes that died have left their
addresses in it under the very names that the next ones use, and those then wait for the dead. So the processes of an
attempt first agree on a name that no other attempt has had. What they say of themselves is stale until its writer has
written it anew; the main process therefore repeats its offer until all have answered it.
"""

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

_PAUSE_S = 0.02


def is_store_reused() -> bool:
    """Whether torchrun lends this process a store that earlier attempts may have written to."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_of_this_attempt(rank: int, size: int, timeout: timedelta) -> Store:
    """The store that torchrun lends, under a name of this attempt; all processes of the attempt must call.

    Raises TimeoutError if they do not find one another.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    lent = TCPStore(host, port, world_size=None, is_master=False, timeout=timeout)
    return PrefixStore(agree_on_attempt(PrefixStore("opencoca", lent), rank, size, timeout), lent)


def agree_on_attempt(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that all processes of this attempt get, and none of another one."""
    deadline = time.monotonic() + timeout.total_seconds()
    own = uuid.uuid4().hex
    if rank > 0:
        return _follow(store, rank, own, deadline)
    others = range(1, size)
    answer = f"answer to {own}"
    waiting = set(others)
    while waiting:
        names = ",".join(_read(store, f"name/{other}") for other in others)
        store.set("offer", f"{own},{names}")
        waiting = {other for other in waiting if _read(store, f"answer/{other}") != answer}
        _pause(deadline)
    return own


def _follow(store: Store, rank: int, own: str, deadline: float) -> str:
    store.set(f"name/{rank}", own)
    while True:
        attempt, *names = _read(store, "offer").split(",")
        if rank <= len(names) and names[rank - 1] == own:
            store.set(f"answer/{rank}", f"answer to {attempt}")
            return attempt
        _pause(deadline)


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("the processes of this run have not all been started; see torchrun's messages")
    time.sleep(_PAUSE_S)
