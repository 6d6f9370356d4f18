"""A process group of one rank in NCCL's place: torch's fake group, which copies inputs to outputs, as one rank would.

Collectives of objects are answered here: torch would send them as tensors that the fake group leaves as they are.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"


def install() -> None:
    """Makes `init_process_group("nccl")` give that group. Another backend is an error: a GPU run has no use for it."""
    init = dist.init_process_group

    def init_process_group(backend: str | None = None, *, rank: int = 0, world_size: int = 1, **_: object) -> None:
        assert backend == "nccl" and world_size == 1, (backend, world_size)
        init("fake", store=dist.HashStore(), rank=rank, world_size=world_size)

    def all_gather_object(gathered: list, value: object, group: object = None) -> None:
        gathered[0] = value

    def broadcast_object_list(values: list, *_: object, **__: object) -> None: ...

    for name, value in {
        "init_process_group": init_process_group,
        "all_gather_object": all_gather_object,
        "broadcast_object_list": broadcast_object_list,
        "get_backend": lambda group=None: "nccl",
    }.items():
        setattr(dist, name, value)
        setattr(distributed_c10d, name, value)
