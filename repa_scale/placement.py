"""Which rank of how many this process is, and where they meet, under every launcher. No torch.

`adopt` writes what it finds into the variables that torch reads, so that everything behind it sees one convention.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from repa_scale.errors import ConfigError

PORTS = (20000, 30000)  # below what kernels give to outgoing connections


@dataclass(frozen=True)
class Placement:
    """Attributes:
    local_size: processes of the run on this node.
    master: address and port where the ranks meet; None for a process alone.
    launcher: who said so.
    """

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    master: tuple[str, int] | None
    launcher: str


def find(environment: Mapping[str, str] = os.environ) -> Placement:
    """Reads the variables of `deepspeed` and `torchrun`, of Open MPI's `mpirun`, or of Slurm's `srun`, in this order.

    Of Slurm's only those of a step count: in a batch script, whose variables look like those of the first of many
    tasks, a process is alone.

    Raises:
        ConfigError: they are incomplete.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _torch(environment)
    if "OMPI_COMM_WORLD_RANK" in environment:
        return _open_mpi(environment)
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        return _slurm(environment)
    return Placement(0, 0, 1, 1, None, "alone")


def adopt(environment: MutableMapping[str, str] = os.environ) -> Placement:
    """`find`, written into RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    placement = find(environment)
    if placement.master is not None:
        environment.update(
            RANK=str(placement.rank),
            LOCAL_RANK=str(placement.local_rank),
            WORLD_SIZE=str(placement.world_size),
            LOCAL_WORLD_SIZE=str(placement.local_size),
            MASTER_ADDR=placement.master[0],
            MASTER_PORT=str(placement.master[1]),
        )
    return placement


def _torch(environment: Mapping[str, str]) -> Placement:
    """deepspeed calls the local size LOCAL_SIZE."""
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in environment]
    world = int(environment.get("WORLD_SIZE", 1))
    if world > 1:
        missing += [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not set, but RANK or WORLD_SIZE is; a launcher sets RANK, LOCAL_RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT: set all, or none for one process"
        )
    rank = int(environment["RANK"])
    if not 0 <= rank < world:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world}")
    master = None
    if "MASTER_ADDR" in environment:
        master = environment["MASTER_ADDR"], int(environment.get("MASTER_PORT", 29500))
    local_size = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world
    return Placement(rank, int(environment.get("LOCAL_RANK", 0)), world, int(local_size), master, "torch")


def _open_mpi(environment: Mapping[str, str]) -> Placement:
    rank, local_rank, world, local_size = (
        int(environment[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")
    )
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if local_size == world else "")
    if not address:
        raise ConfigError(
            "mpirun does not tell the ranks where the first of them is; add: mpirun -x MASTER_ADDR=FIRST_NODE ..."
        )
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or ""
    return Placement(rank, local_rank, world, local_size, (address, _port(environment, job)), "mpirun")


def _slurm(environment: Mapping[str, str]) -> Placement:
    rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    world = int(environment["SLURM_STEP_NUM_TASKS"])
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    address = environment.get("MASTER_ADDR") or first_node(nodes)
    job = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    sizes = _tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", str(world)))
    local_size = sizes[min(int(environment.get("SLURM_NODEID", 0)), len(sizes) - 1)]
    return Placement(rank, local_rank, world, local_size, (address, _port(environment, job)), "srun")


def first_node(nodes: str) -> str:
    """The first of Slurm's node list: `gpu[003-010,12]-ib,other` -> `gpu003-ib`."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?(?:,|$)", nodes)
    if found is None:
        raise ConfigError(f"the node list {nodes!r} of Slurm is not understood; set MASTER_ADDR to the first node")
    return "".join(part or "" for part in found.groups())


def _tasks(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    sizes = []
    for size, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        sizes += [int(size)] * int(times or 1)
    return sizes or [1]


def _port(environment: Mapping[str, str], job: str) -> int:
    """MASTER_PORT, or one that follows from the job, so that all ranks come to the same and two jobs to others."""
    if "MASTER_PORT" in environment:
        return int(environment["MASTER_PORT"])
    return PORTS[0] + zlib.crc32(job.encode()) % (PORTS[1] - PORTS[0])
