"""Who this process is among the processes of the run, and the process group that joins them."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
from collections.abc import MutableMapping
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from repa_scale import cuda
from repa_scale.caches import use_local_caches
from repa_scale.errors import ConfigError, MachineError
from repa_scale.placement import adopt
from repa_scale.rendezvous import elastic_store

log = logging.getLogger("repa_scale")
_SET_BY_US: dict[str, str] = {}  # variables that `start` made for a process alone


@dataclass(frozen=True)
class Ranks:
    """Rank, local rank and number of processes; the device that this process works on; processes on this node."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls, device: str = "auto", environment: MutableMapping[str, str] = os.environ) -> Ranks:
        """As the launcher says, whichever it is (placement.py); without one: a process alone.

        Raises:
            ConfigError: the launcher's variables are incomplete, or `pick_device` refuses `device`.
        """
        place = adopt(environment)
        use_local_caches(environment)
        return cls(
            place.rank, place.local_rank, place.world_size, pick_device(device, place.local_rank), place.local_size
        )

    def start(self, timeout_minutes: float = 30.0) -> None:
        """Joins the process group (NCCL on CUDA, gloo elsewhere). One process alone makes a group of its own.

        Raises:
            MachineError: on CUDA without NCCL.
        """
        if dist.is_initialized():
            return
        if self.device.type == "cuda":
            if problem := cuda.nccl_problem(cuda.look()):
                raise MachineError(problem)
            torch.cuda.set_device(self.device)
        else:
            _keep_freed_memory()
        if "MASTER_ADDR" not in os.environ:
            ours = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(_free_port()),
                "RANK": str(self.rank),
                "LOCAL_RANK": str(self.local_rank),
                "WORLD_SIZE": str(self.world_size),
            }
            os.environ.update(ours)
            _SET_BY_US.update(ours)
        timeout = timedelta(minutes=timeout_minutes)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=elastic_store(self.rank, self.world_size, timeout),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
        )

    def leave(self) -> None:
        """Leaves the process group; without it some runs abort at exit."""
        if dist.is_initialized():
            dist.destroy_process_group()
        while _SET_BY_US:  # else a process that is started later would take our port for its own
            os.environ.pop(_SET_BY_US.popitem()[0], None)

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def broadcast_object(self, value: object) -> object:
        """Rank 0's `value`, on every rank."""
        if not dist.is_initialized():
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: object) -> list:
        """Every rank's `value`, in the order of the ranks, on every rank."""
        if not dist.is_initialized():
            return [value]
        boxes: list = [None] * self.world_size
        dist.all_gather_object(boxes, value)
        return boxes

    def store(self) -> dist.Store:
        """The key-value store of the process group, over a connection of its own: for threads that must not disturb
        the training's collectives."""
        store = dist.distributed_c10d._get_default_store()
        try:
            return store.clone()
        except (AttributeError, RuntimeError, NotImplementedError):  # a torch or a kind of store without it
            return store


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """`auto`: the local rank's GPU where there is one, else the CPU; the log says why if torch or a driver is for CUDA.

    Raises:
        MachineError: `cuda` asked for where there is none, or a GPU that torch can't use (cuda.py).
        ConfigError: more processes on this machine than GPUs.
    """
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        facts = cuda.look()
        problem = cuda.device_problem(facts)
        if problem or device == "cuda":
            cpu = (
                "set the device to cpu (train.device=cpu, --device cpu)"
                if device == "cuda"
                else "hide the GPUs: CUDA_VISIBLE_DEVICES=-1"
            )
            raise MachineError(f"device {device}: {problem or cuda.absence(facts)}; or {cpu}")
        if facts.built or facts.driver:
            level = logging.INFO if facts.built else logging.WARNING
            log.log(level, "device auto: the CPU, because %s", cuda.absence(facts))
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; start at most that "
            "many processes on it (--num_gpus)"
        )
    return torch.device("cuda", local_rank)


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _keep_freed_memory() -> None:
    """Tells glibc to keep large blocks instead of giving them back to the system at every step.

    Without it each activation is mapped and zeroed anew: measured on 2 cores, 15 % of a step of the demo.
    """
    top_pad, trim_threshold, mmap_threshold = -2, -1, -3  # glibc's M_* parameters of mallopt
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(mmap_threshold, 2**31 - 1)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)
