"""The network between the nodes: runs doctor.link on all of them, and names the link or the node that is slow."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
from dataclasses import dataclass

from repa_scale.doctor.finding import FAIL, OK, WARN, Finding
from repa_scale.doctor.nodes import start
from repa_scale.launch.environment import NETWORK
from repa_scale.launch.remote import events

PATIENCE = 150.0  # seconds for the whole test
LATENCY = 5e-3  # seconds there and back of a small message: beyond it nodes do not share a cluster's network
BANDWIDTH = 0.1e9  # bytes a second of an all-reduce: what 1 Gbit/s gives
WORSE = 4.0  # times the median of all pairs
LOST = 1e-3  # share of segments that were sent again, beyond which it is told with a slow link
MODULE = "repa_scale.doctor.link"
REMEDY = "look at its cable, switch port, duplex and MTU (`ip -s link`, `ethtool`), or --exclude a node"


@dataclass
class Measured:
    """Of rank 0: seconds of a small all-reduce; bytes and seconds of a large one; pairs; share of lost segments."""

    latency: float
    bytes: int
    seconds: float
    pairs: list[list]
    lost: list[float]

    def bandwidth(self, ranks: int) -> float:
        """Bytes a second over each link, as NCCL's tests count them (bus bandwidth)."""
        return 2 * (ranks - 1) / ranks * self.bytes / self.seconds


def network(hosts: list[str], names: list[str], address: str, per_node: int, backend: str) -> list[Finding]:
    """An all-reduce over all nodes with its bandwidth; where that is slow, each two nodes alone.

    Args:
        hosts: to start it on; empty: this machine.
        address: of the first node, for the others.
        per_node: ranks on each node: its GPUs under NCCL, else 1.
    """
    ranks = len(hosts) * per_node
    found = run(hosts, names, address, per_node, backend, pairs=False)
    if isinstance(found, list):
        return found
    words = f"{backend}, {ranks} ranks: {found.bandwidth(ranks) / 1e6:,.1f} MB/s, {found.latency * 1e3:.2f} ms"
    slow = found.bandwidth(ranks) < BANDWIDTH or found.latency > LATENCY * max(1, len(hosts) - 1)
    if len(hosts) == 1 or not slow:
        state = WARN if slow else OK
        return [Finding("all-reduce", state, words, REMEDY if slow else "")]
    pairs = run(hosts, names, address, per_node, backend, pairs=True)
    if isinstance(pairs, list):
        return pairs
    return [Finding("all-reduce", WARN, f"slow: {words}", REMEDY), *name_slow(names, pairs)]


def name_slow(names: list[str], found: Measured) -> list[Finding]:
    """The links that are slow; a node whose links are slow to most others stands for them."""
    latencies, rates = [row[2] for row in found.pairs], [row[3] for row in found.pairs]
    most_latency = max(LATENCY, WORSE * statistics.median(latencies)) if len(names) > 3 else LATENCY
    least_rate = max(BANDWIDTH, statistics.median(rates) / WORSE) if len(names) > 3 else BANDWIDTH
    slow = [row for row in found.pairs if row[2] > most_latency or row[3] < least_rate]
    count = [sum(node in row[:2] for row in slow) for node in range(len(names))]
    guilty = [node for node in range(len(names)) if len(names) > 2 and count[node] > (len(names) - 1) / 2]
    findings = []
    for node in guilty:
        rows = [row for row in slow if node in row[:2]]
        words = f"slow to {count[node]} of {len(names) - 1} nodes: {_figures(rows[0])}{_lost(found, names, node)}"
        findings.append(Finding("link", FAIL, words, REMEDY, names[node]))
    for row in slow:
        if not set(row[:2]) & set(guilty):
            lost = "".join(_lost(found, names, node) for node in row[:2])
            words = f"{names[row[0]]} - {names[row[1]]} is slow: {_figures(row)}{lost}"
            findings.append(Finding("link", FAIL, words, REMEDY, f"{names[row[0]]} - {names[row[1]]}"))
    return findings


def _figures(row: list) -> str:
    return f"{row[2] * 1e3:.1f} ms there and back, {row[3] / 1e6:.2f} MB/s"


def _lost(found: Measured, names: list[str], node: int) -> str:
    return f", {found.lost[node]:.1%} of what {names[node]} sent was sent again" if found.lost[node] > LOST else ""


def run(
    hosts: list[str], names: list[str], address: str, per_node: int, backend: str, pairs: bool
) -> Measured | list[Finding]:
    """What rank 0 measured; or findings that name the nodes that did not come or broke."""
    world = len(hosts) * per_node
    processes: list[subprocess.Popen] = []
    came, errors, results = set(), {}, []

    def begin(node: int, port: int) -> subprocess.Popen:
        words = [node * per_node, world, 0, per_node, address, port, backend, int(pairs)]
        variables = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(NETWORK)]
        process = start(hosts[node], MODULE, subprocess.DEVNULL, *map(str, words), variables=variables)
        processes.append(process)
        return process

    def listen(node: int, process: subprocess.Popen) -> None:
        for event in events(process.stdout):
            if event["event"] == "came":
                came.add(node)
            elif event["event"] == "measured":
                results.append(Measured(**{key: value for key, value in event.items() if key != "event"}))
        lines = process.stderr.read().decode(errors="replace").strip().splitlines()
        if process.wait() and lines:
            errors[node] = lines[-1]

    timer = threading.Timer(PATIENCE, lambda: [process.kill() for process in processes])
    timer.start()
    try:
        first = begin(0, 0)
        port = next((event["port"] for event in events(first.stdout) if event["event"] == "port"), None)
        threads = [threading.Thread(target=listen, args=(0, first))]
        if port is not None:
            threads += [threading.Thread(target=listen, args=(n, begin(n, port))) for n in range(1, len(hosts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        timer.cancel()
        for process in processes:
            process.kill()
            process.wait()
    if results:
        return results[0]
    return _broken(names, came, errors)


def _broken(names: list[str], came: set[int], errors: dict[int, str]) -> list[Finding]:
    """The nodes that did not reach the first one; where all did, every node's last words."""
    remedy = (
        "open the ports above 1024 between the nodes; GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: their network's interface"
    )
    absent = [node for node in range(len(names)) if node not in came]
    what = "did not reach the first node" if absent else "came, but the all-reduce did not end"
    return [
        Finding("all-reduce", FAIL, f"{what}: {errors.get(node, 'no answer')}", remedy, names[node])
        for node in absent or range(len(names))
    ]
