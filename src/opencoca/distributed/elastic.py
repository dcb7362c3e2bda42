"""Lets processes that torchrun has restarted meet without finding anything of an earlier attempt.

torchrun keeps one store of keys for all attempts (pytorch/pytorch issue 135712). Processes that died have left their
addresses in it under the names that their successors use, which would then wait for the dead ones. So the processes of
an attempt first agree on a name that no other attempt has had. A key may still hold an old value until its writer has
overwritten it; the main process therefore repeats its offer until all processes have answered it.
"""

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

_PAUSE_S = 0.02


def is_store_reused() -> bool:
    """Whether torchrun provides a store that earlier attempts may have written to."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_of_this_attempt(rank: int, size: int, timeout: timedelta) -> Store:
    """Returns torchrun's store under a name of this attempt alone; all processes of the attempt must call.

    Raises TimeoutError if they do not find one another.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    lent = TCPStore(host, port, world_size=None, is_master=False, timeout=timeout)
    return PrefixStore(agree_on_attempt(PrefixStore("opencoca", lent), rank, size, timeout), lent)


def agree_on_attempt(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """Returns a name that all processes of this attempt share and that no other attempt has."""
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
