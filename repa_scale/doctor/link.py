"""A node's side of the network test: an all-reduce over all nodes, and messages between each two of them.

`python -m repa_scale.doctor.link` with the words of a Place. Rank 0 opens the store (port 0) and says where; at the end
it says what was measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import get_type_hints

import torch
import torch.distributed as dist

SIZES = tuple(1 << power for power in (12, 16, 20, 24, 26, 28))  # bytes
ENOUGH = 0.3  # seconds: a larger message is not tried after one that took so long
PATIENCE = timedelta(seconds=90)
SMALL = 8  # bytes, for the time on the way


@dataclass(frozen=True)
class Place:
    """One process of the test: its arguments, as strings on the command line, in this order."""

    rank: int
    world: int
    local: int  # its number on the node, and its GPU's
    per_node: int
    address: str
    port: int
    backend: str
    pairs: int  # whether each two nodes are measured

    @classmethod
    def of(cls, words: list[str]) -> Place:
        kinds = get_type_hints(cls).values()
        return cls(*(kind(word) for kind, word in zip(kinds, words, strict=True)))

    def words(self) -> list[str]:
        return [str(value) for value in astuple(self)]


def main(place: Place) -> int:
    """The first process of a node starts the others."""
    leads = place.rank == 0
    store = dist.TCPStore(place.address, place.port, place.world, leads, PATIENCE, wait_for_workers=False)
    if leads:
        say(event="port", port=store.port)
    say(event="came")
    children = []
    for number in range(1, place.per_node if place.local == 0 else 1):
        other = replace(place, rank=place.rank + number, local=number, port=store.port)
        children.append(subprocess.Popen([sys.executable, "-m", "repa_scale.doctor.link", *other.words()]))
    try:
        measure(place, store)
    finally:
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()
            child.wait()
    return 0


def measure(place: Place, store: dist.Store) -> None:
    """Joins the others, measures with them, and tells what was found (rank 0)."""
    rank, world, local, per_node, backend = place.rank, place.world, place.local, place.per_node, place.backend
    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    bound = device if backend == "nccl" else None
    if bound:
        torch.cuda.set_device(bound)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE, device_id=bound)
    sent = segments()
    latency, size, seconds = all_reduce(device)
    found = {"latency": latency, "bytes": size, "seconds": seconds, "pairs": []}
    if place.pairs:
        found["pairs"] = all_pairs(rank, world // per_node, per_node, device, size)
    lost = [0.0] * world
    dist.all_gather_object(lost, again(sent, segments()))
    if rank == 0:
        say(event="measured", **found, lost=lost[::per_node])
    dist.barrier()
    dist.destroy_process_group()


def all_reduce(device: torch.device) -> tuple[float, int, float]:
    """Seconds of a small all-reduce, and bytes and seconds of the largest that was tried; the same on every rank."""
    small = torch.ones(SMALL // 4, device=device)
    dist.all_reduce(small)  # connects
    latency = slowest(min(timed(lambda: dist.all_reduce(small), device) for _ in range(5)), device)
    for size in SIZES:
        values = torch.ones(size // 4, device=device)
        seconds = slowest(timed(lambda values=values: dist.all_reduce(values), device), device)
        if seconds > ENOUGH:
            break
    return latency, size, seconds


def all_pairs(rank: int, nodes: int, per_node: int, device: torch.device, size: int) -> list[list]:
    """(node, node, seconds there and back of a small message, bytes a second) of each two nodes, on rank 0."""
    mine = []
    for together in rounds(nodes):
        dist.barrier()
        for pair in together:
            ranks = [node * per_node for node in pair]
            if rank in ranks:
                other = ranks[1 - ranks.index(rank)]
                mine.append([*pair, *exchange(rank, other, device, size)])
    everything: list = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine)
    best: dict[tuple[int, int], list] = {}
    for row in (row for rows in everything for row in rows):
        best.setdefault((row[0], row[1]), row)
    return list(best.values())


def exchange(rank: int, other: int, device: torch.device, size: int) -> tuple[float, float]:
    """Both ranks call it. Seconds of a small message there and back, and bytes a second of a large one."""
    first = rank < other

    def there_and_back(values: torch.Tensor) -> None:
        for sending in (first, not first):
            (dist.send if sending else dist.recv)(values, other)

    small, large = (torch.ones(count // 4, device=device) for count in (SMALL, size))
    there_and_back(small)
    latency = min(timed(lambda: there_and_back(small), device) for _ in range(3))
    return latency, 2 * size / timed(lambda: there_and_back(large), device)


def rounds(nodes: int) -> Iterator[list[tuple[int, int]]]:
    """Every two nodes once, each node at most once a round: what circle tournaments do."""
    seats = list(range(nodes)) + [-1] * (nodes % 2)
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def timed(action, device: torch.device) -> float:
    """Seconds."""
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def slowest(seconds: float, device: torch.device) -> float:
    """The longest of all ranks."""
    value = torch.tensor([seconds], device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def segments() -> tuple[int, int]:
    """TCP segments that this node has sent, and sent again."""
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")]
    values = dict(zip(lines[0], lines[1], strict=True))
    return int(values["OutSegs"]), int(values["RetransSegs"])


def again(before: tuple[int, int], after: tuple[int, int]) -> float:
    """The share of segments that was sent again."""
    return (after[1] - before[1]) / max(1, after[0] - before[0])


def say(**words: object) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(Place.of(sys.argv[1:])))
