"""Where the ranks meet: at a store of rank 0, or at torchrun's, whose store outlives its restarts: a corner of it for
this start alone.

torch's own keys in that store are the same at every start, so after a restart a rank may read the address of a process
that is gone. The number of restarts does not tell the starts apart either: each node's agent counts its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.05


def meeting_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """torchrun's store, or one that rank 0 opens at MASTER_ADDR and MASTER_PORT; under a prefix of its own.

    Raises:
        RuntimeError, TimeoutError: it cannot be reached, or opened.
    """
    store = elastic_store(rank, world_size, timeout)
    if store is None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(
            address, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
    return dist.PrefixStore("repa_scale", store)


def elastic_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """torchrun's store under a prefix that the ranks of this start have agreed on; None under another launcher.

    Raises:
        TimeoutError: not all ranks came.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"repa_scale/{agree(store, rank, world_size, timeout)}", store)


def agree(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all living ranks come to, and no start before them.

    Each leaves a word that nobody can have left before. Rank 0 shows the list of the words that it finds; who finds its
    own in the list answers to that list; when all have answered, no word was an old one.
    """
    mine = uuid.uuid4().hex
    store.set(f"word/{rank}", mine)
    until = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < until:
        if rank == 0 and store.check([f"word/{other}" for other in range(world_size)]):
            shown = [store.get(f"word/{other}").decode() for other in range(world_size)]
            store.set("words", json.dumps(shown))
        if store.check(["words"]):
            words = json.loads(store.get("words"))
            if words[rank : rank + 1] == [mine]:
                name = hashlib.sha256("".join(words).encode()).hexdigest()[:16]
                store.set(f"{name}/{rank}", "here")
                if store.check([f"{name}/{other}" for other in range(world_size)]):
                    return name
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"not all {world_size} ranks came in {timeout.total_seconds():.0f} s")
