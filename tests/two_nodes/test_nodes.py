"""The two-node set-up itself: apart where nodes are apart, joined where they are joined, and gone afterwards."""

import time

import pytest

pytestmark = pytest.mark.distributed


def test_two_nodes(nodes):
    both = nodes.run(nodes.a, "pdsh", "-R", "ssh", "-S", "-w", "rs-a,rs-b", "hostname; exit 7")
    assert both.returncode == 7 and sorted(both.stdout.split()) == ["rs-a", "rs-a:", "rs-b", "rs-b:"], both.stderr
    nodes.run(nodes.a, "touch", nodes.private / "mine", "/dev/shm/mine")
    assert nodes.run(nodes.b, "ls", nodes.private, "/dev/shm").stdout.count("mine") == 0
    seen = nodes.run(nodes.b, "ps", "-e", "-o", "comm=").stdout.split()
    assert seen[0] == "sshd" and len(seen) < 10, "its processes are its own"
    nodes.part()
    assert nodes.run(nodes.a, "ssh", "-o", "ConnectTimeout=1", "rs-b", "true").returncode == 255
    nodes.rejoin()
    assert nodes.run(nodes.a, "ssh", "rs-b", "true").returncode == 0


def test_a_slow_link_is_slow(nodes):
    nodes.slow_link(delay_ms=50.0, loss=0.01)
    try:
        began = time.monotonic()
        assert nodes.run(nodes.a, "bash", "-c", "exec 3<>/dev/tcp/rs-b/22; read -u 3 -n 3").returncode == 0
        assert time.monotonic() - began > 0.2, "connecting and the greeting take two times there and back"
    finally:
        nodes.fast_link()
    began = time.monotonic()
    assert nodes.run(nodes.a, "bash", "-c", "exec 3<>/dev/tcp/rs-b/22; read -u 3 -n 3").returncode == 0
    assert time.monotonic() - began < 0.2
