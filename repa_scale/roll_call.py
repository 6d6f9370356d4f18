"""What the ranks tell each other before they join: host, kind of device, GPUs, and why one of them cannot come.

Each rank leaves a report in the store, rank 0 reads all and leaves one verdict for all. Nobody waits in NCCL for a rank
that has ended, or for one that has fallen back to the CPU.
"""

from __future__ import annotations

import atexit
import json
import logging
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from repa_scale import timeouts
from repa_scale.errors import ConfigError, UserError, reason
from repa_scale.rendezvous import meeting_store

POLL_SECONDS = 0.05  # rank 0's first; doubled up to half a second
MORE_SECONDS = 2.0  # after the first problem, for those of other ranks
SLICE = timedelta(seconds=10)  # of a wait in the store, which Ctrl-C does not end

log = logging.getLogger("repa_scale")


@dataclass(frozen=True)
class Report:
    """What one rank says.

    Attributes:
        device: `cuda` or `cpu`; empty where an error came before it was known.
        gpus: that torch shows this rank.
        error: why this rank cannot join, on one line.
        user: the error is one that the user can fix.
    """

    host: str
    device: str = ""
    gpus: int = 0
    error: str = ""
    user: bool = True


@dataclass(frozen=True)
class Verdict:
    """What rank 0 makes of the reports.

    Attributes:
        problem: why the run does not start, on one line; empty: it starts.
        user: the problem is one that the user can fix.
        speakers: ranks that print their own error: the first of each host that has it, unless rank 0 has the same.
    """

    problem: str = ""
    user: bool = True
    speakers: tuple[int, ...] = ()


def judge(reports: Mapping[int, Report], world: int, seconds: float) -> Verdict:
    """The verdict on the reports that came in `seconds`, by rank. An error counts more than a rank that is missing."""
    errors = {rank: report for rank, report in sorted(reports.items()) if report.error}
    if errors:
        first: dict[tuple[str, str], int] = {}
        for rank, report in errors.items():
            first.setdefault((report.host, report.error), rank)
        theirs = reports[0].error if 0 in reports else ""
        rank, report = next(iter(errors.items()))
        more = f" (and {len(errors) - 1} more ranks cannot join)" if len(errors) > 1 else ""
        user = all(report.user for report in errors.values())
        speakers = tuple(rank for (_, error), rank in first.items() if rank != 0 and error != theirs)
        return Verdict(f"rank {rank} on {report.host}: {report.error}{more}", user, speakers)
    if missing := [rank for rank in range(world) if rank not in reports]:
        return Verdict(
            f"{_ranks(missing)} of {world} did not come in {seconds:.0f} s; look for what they print, and whether they "
            "reach MASTER_ADDR and MASTER_PORT",
            user=False,
        )
    return Verdict(_mixed_devices(reports) or _mixed_counts(reports))


def _mixed_devices(reports: Mapping[int, Report]) -> str:
    kinds: dict[str, list[int]] = {}
    for rank, report in sorted(reports.items()):
        kinds.setdefault(report.device, []).append(rank)
    if len(kinds) < 2:
        return ""
    where = "; ".join(f"{kind} on {_placed(ranks, reports)}" for kind, ranks in sorted(kinds.items(), reverse=True))
    return (
        f"all ranks need one kind of device, but they have {where}; run repa-scale doctor where a GPU is missing, or "
        "set the device to cpu on all (train.device=cpu, --device cpu)"
    )


def _mixed_counts(reports: Mapping[int, Report]) -> str:
    """Nodes may differ; on one node all ranks must see the same GPUs, else two of them may take the same one."""
    hosts: dict[str, dict[int, list[int]]] = {}
    for rank, report in sorted(reports.items()):
        hosts.setdefault(report.host, {}).setdefault(report.gpus, []).append(rank)
    for host, counts in hosts.items():
        if len(counts) > 1:
            seen = ", ".join(f"{gpus} by {_ranks(ranks)}" for gpus, ranks in sorted(counts.items()))
            return (
                f"the ranks of one node must see the same GPUs, but on {host} torch shows {seen}; give them one "
                "CUDA_VISIBLE_DEVICES, and look at nvidia-smi for a GPU that was lost"
            )
    return ""


def call(store: dist.Store, rank: int, world: int, report: Report, patience: float) -> Verdict:
    """Leaves the report and returns the verdict, the same on every rank. Of a bad one rank 0 stays, at its exit,
    until all have heard it.

    Raises:
        TimeoutError, RuntimeError: there was no verdict in `patience` seconds, or the store is gone.
    """
    store = dist.PrefixStore("roll_call", store)
    store.set(f"report/{rank}", json.dumps(asdict(report)))
    if report.error:
        store.set("problem", "there")
    if rank == 0:
        store.set("verdict", json.dumps(asdict(_gather(store, world, patience))))
    words = json.loads(_wait(store, "verdict", patience + timeouts.TELL))
    verdict = Verdict(**{**words, "speakers": tuple(words["speakers"])})
    if verdict.problem:
        store.add("heard", 1)
        if rank == 0:
            atexit.register(_stay, store, world, time.monotonic() + timeouts.TELL)
    return verdict


def _stay(store: dist.Store, world: int, until: float) -> None:
    """Rank 0, which may hold the store: who comes late finds it here, and the verdict."""
    with suppress(RuntimeError):
        while store.add("heard", 0) < world and time.monotonic() < until:
            time.sleep(POLL_SECONDS)


def _gather(store: dist.Store, world: int, patience: float) -> Verdict:
    """Rank 0: waits for all reports, or for the first problem and a moment more."""
    names = [f"report/{rank}" for rank in range(world)]
    began, pause = time.monotonic(), POLL_SECONDS
    until = began + patience
    problem = False
    while not store.check(names) and time.monotonic() < until:
        if not problem and store.check(["problem"]):
            problem, until = True, min(until, time.monotonic() + MORE_SECONDS)
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    reports = {rank: Report(**json.loads(store.get(name))) for rank, name in enumerate(names) if store.check([name])}
    return judge(reports, world, time.monotonic() - began)


def _wait(store: dist.Store, name: str, patience: float) -> bytes:
    until = time.monotonic() + patience
    while True:
        try:
            store.wait([name], min(SLICE, timedelta(seconds=patience)))
            return store.get(name)
        except dist.DistStoreError:
            if time.monotonic() > until:
                raise TimeoutError(f"rank 0 gave no verdict on the ranks in {patience:.0f} s") from None


def join(store: dist.Store, rank: int, world: int, report: Report, patience: float) -> None:
    """Comes to the others; returns when all are there and fit each other.

    Raises:
        ConfigError: they do not, or one of them has an error that the user can fix; on every rank.
        RuntimeError, TimeoutError: a rank failed otherwise, or did not come.
    """
    verdict = call(store, rank, world, report, patience)
    if verdict.problem:
        raise (ConfigError if verdict.user else RuntimeError)(verdict.problem)


@contextmanager
def telling(rank: int, world: int) -> Iterator[None]:
    """What ends this rank inside, before it has joined, is told to the others, which then end with the same line."""
    try:
        yield
    except Exception as error:
        if world > 1:
            _tell(rank, world, error)
        raise


def _tell(rank: int, world: int, error: Exception) -> None:
    user = isinstance(error, UserError)
    text = str(error) if user else f"{type(error).__name__}: {reason(error)}"
    speaks = True
    with suppress(RuntimeError, TimeoutError, KeyError, ValueError):  # the others are not there, or gone
        store = meeting_store(rank, world, timedelta(seconds=timeouts.TELL))
        report = Report(platform.node(), error=text, user=user)
        speaks = rank in call(store, rank, world, report, timeouts.TELL).speakers
    if rank != 0 and speaks:  # rank 0's is printed where it ends
        print(f"repa-scale: error on {platform.node()} rank {rank}: {text}", file=sys.stderr, flush=True)


def _placed(ranks: list[int], reports: Mapping[int, Report]) -> str:
    """`ranks 0-7 on gpu-1, ranks 8-14 on gpu-2`."""
    hosts: dict[str, list[int]] = {}
    for rank in ranks:
        hosts.setdefault(reports[rank].host, []).append(rank)
    return ", ".join(f"{_ranks(theirs)} on {host}" for host, theirs in hosts.items())


def _ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-7, 9`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{'ranks' if len(runs) > 1 or runs[0][0] < runs[0][1] else 'rank'} {words}"
