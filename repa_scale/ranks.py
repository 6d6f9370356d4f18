"""Who this process is among the processes of the run, and the process group that joins them."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from repa_scale import cuda, host_group, timeouts
from repa_scale.caches import use_local_caches
from repa_scale.errors import ConfigError, MachineError
from repa_scale.placement import adopt
from repa_scale.rendezvous import elastic_store, meeting_store
from repa_scale.roll_call import Report, join, telling

log = logging.getLogger("repa_scale")
_SET_BY_US: dict[str, str] = {}  # variables that `start` made for a process alone
_timeout = timedelta(seconds=timeouts.collectives())  # of the process group


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

    @property
    def timeout(self) -> timedelta:
        """Of a collective of the process group, and of the groups that are made from it."""
        return _timeout

    @classmethod
    def from_environment(cls, device: str = "auto", environment: MutableMapping[str, str] = os.environ) -> Ranks:
        """As the launcher says, whichever it is (placement.py); without one: a process alone. A rank that cannot have
        its device tells the others.

        Raises:
            ConfigError: the launcher's variables are incomplete, or `pick_device` refuses `device`.
        """
        place = adopt(environment)
        use_local_caches(environment)
        with telling(place.rank, place.world_size):
            found = pick_device(device, place.local_rank)
        return cls(place.rank, place.local_rank, place.world_size, found, place.local_size)

    def telling(self) -> AbstractContextManager[None]:
        """What ends this rank inside, before `start`, is told to the others, which then end with the same line."""
        return telling(self.rank, self.world_size)

    def start(self, timeout: float | None = None, words_only: bool = False) -> None:
        """Joins the process group (NCCL on CUDA, gloo elsewhere). One process alone makes a group of its own.

        Args:
            timeout: seconds after which a collective is aborted; None: as without a watchdog (timeouts.py).
            words_only: the ranks exchange barriers and objects, and no tensors: gloo, with the host group's patience.

        Raises:
            MachineError: on CUDA without NCCL.
            ConfigError: the ranks do not fit each other, or one of them cannot join (roll_call.py); on every rank.
            UserError: the ranks' hosts cannot connect to each other.
        """
        if dist.is_initialized():
            return
        nccl = self.device.type == "cuda" and not words_only
        with self.telling():
            if nccl and (problem := cuda.nccl_problem(cuda.look())):
                raise MachineError(problem)
        if self.device.type == "cuda":
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
        global _timeout
        _timeout = timedelta(seconds=timeouts.HOST if words_only else timeout or timeouts.collectives())
        many = self.world_size > 1
        store = self._meet() if many else elastic_store(0, 1, timedelta(seconds=timeouts.JOIN))
        if nccl:
            # Bound to a device NCCL connects here, where a fault has a name, and later groups are split from this one.
            bound = self.device if many else None
            self._init("nccl", store, timeout=_timeout, device_id=bound)
        else:
            host_group.choose_interface()
            with host_group.connecting():
                self._init("gloo", store, timeout=host_group.CONNECT)
            host_group.set_timeout(_timeout)
        if many and not words_only:
            host_group.open_group()

    @contextmanager
    def joined(self, words_only: bool = False) -> Iterator[None]:
        """`start`, and `leave` at the end. After an error only a process alone leaves: others may be in a collective,
        and leaving would wait for them."""
        self.start(words_only=words_only)
        try:
            yield
        except BaseException:
            if self.world_size == 1:
                self.leave()
            raise
        self.leave()

    def _init(self, backend: str, store: dist.Store | None, **words: object) -> None:
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, **words)

    def _meet(self) -> dist.Store:
        """The store where all ranks have come and fit each other."""
        store = meeting_store(self.rank, self.world_size, timedelta(seconds=timeouts.JOIN))
        gpus = torch.cuda.device_count() if self.device.type == "cuda" else 0
        report = Report(platform.node(), self.device.type, gpus)
        join(store, self.rank, self.world_size, report, timeouts.JOIN)
        return store

    def leave(self) -> None:
        """Leaves the process group; without it some runs abort at exit."""
        leave_group()

    def barrier(self) -> None:
        """Waits for all ranks, on the host: work on the device goes on."""
        if self._shared():
            host_group.barrier()

    def broadcast_object(self, value: object) -> object:
        """Rank 0's `value`, on every rank."""
        return host_group.broadcast(value) if self._shared() else value

    def gather_objects(self, value: object) -> list:
        """Every rank's `value`, in the order of the ranks, on every rank."""
        return host_group.gather(value) if self._shared() else [value]

    def _shared(self) -> bool:
        return self.world_size > 1 and dist.is_initialized()

    def store(self) -> dist.Store:
        """The key-value store of the process group, over a connection of its own: for threads that must not disturb
        the training's collectives."""
        store = dist.distributed_c10d._get_default_store()
        try:
            return store.clone()
        except (AttributeError, RuntimeError, NotImplementedError):  # a torch or a kind of store without it
            return store


def leave_group() -> None:
    """Leaves the process group that `Ranks.start` joined, if there is one."""
    host_group.forget()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    while _SET_BY_US:  # else a process that is started later would take our port for its own
        os.environ.pop(_SET_BY_US.popitem()[0], None)


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """`auto`: the local rank's GPU where there is one, else the CPU; the log says why if torch or a driver is for CUDA.

    Raises:
        MachineError: `cuda` asked for where there is none, or a GPU that torch can't use (cuda.py), which `auto` does
            not pass over either: a run on the CPU would be a hundred times slower, without a word.
        ConfigError: more processes on this machine than GPUs.
    """
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        facts = cuda.look()
        if problem := cuda.device_problem(facts):
            raise MachineError(f"device {device}: {problem}; or set the device to cpu (train.device=cpu, --device cpu)")
        if device == "cuda":
            raise MachineError(
                f"device cuda: {cuda.absence(facts)}; or set the device to cpu (train.device=cpu, --device cpu)"
            )
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
