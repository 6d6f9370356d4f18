"""Check of what a fork does to a process whose NCCL uses EFA: loader workers are forked after NCCL has started."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from repa_scale.doctor.finding import OK, WARN, Finding, Look

INFINIBAND = Path("/sys/class/infiniband")
ASKS = ("FI_EFA_FORK_SAFE", "RDMAV_FORK_SAFE", "IBV_FORK_SAFE")  # libfabric's own, and what libibverbs reads
UNNEEDED = 2  # IBV_FORK_UNNEEDED: the kernel copies pinned pages on fork
REMEDY = "export FI_EFA_FORK_SAFE=1 (it is forwarded), or use Linux 5.13 with rdma-core 35, or newer"


def fork(look: Look) -> list[Finding]:
    """Whether libfabric's EFA provider lets a process fork; without support it aborts it.

    Nothing where there is no EFA: NCCL asks for fork support itself where it uses InfiniBand without libfabric.
    """
    devices = efa_devices()
    if not devices:
        return []
    asked = [name for name in ASKS if os.environ.get(name, "0").lower() not in ("0", "no", "false", "off")]
    status = fork_status()
    if status == UNNEEDED or asked:
        why = "the kernel copies pages on fork" if status == UNNEEDED else f"{asked[0]} is set"
        return [Finding("fork", OK, f"{len(devices)} EFA devices; {why}")]
    kernel = (
        f"Linux {platform.release()} does not copy pages on fork" if status is not None else "libibverbs cannot tell"
    )
    found = f"{len(devices)} EFA devices; {kernel}, and libfabric ends a process that forks loader workers"
    return [Finding("fork", WARN, found, REMEDY)]


def efa_devices() -> list[str]:
    """Names of the node's RDMA devices that Amazon's driver runs."""
    return sorted(
        path.name for path in INFINIBAND.glob("*") if Path(os.path.realpath(path / "device" / "driver")).name == "efa"
    )


def fork_status() -> int | None:
    """What libibverbs says of fork (`enum ibv_fork_status`); None: it is absent, or older than rdma-core 35."""
    try:
        return int(ctypes.CDLL("libibverbs.so.1").ibv_is_fork_initialized())
    except (OSError, AttributeError):
        return None
