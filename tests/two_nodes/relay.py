"""Carries packets between two network namespaces, late and with losses: what the kernel's netem does, in a process.

relay.py INTERFACE DELAY_MS LOSS NAMESPACE NAMESPACE   makes a tap device INTERFACE in each namespace, prints `ready`,
and runs until it is killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress

TUNSETIFF, IFF_TAP, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0002, 0x1000, 0x40000000


def tap(name: str, namespace: str) -> int:
    """A file descriptor for the packets of a new tap device inside `namespace`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(namespace) as there:
        if libc.setns(there.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def carry(ends: tuple[int, int], delay: float, loss: float) -> None:
    """`delay` in seconds."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    on_the_way: deque[tuple[float, int, bytes]] = deque()
    chance = random.Random(0)
    while True:
        wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        readable, _, _ = select.select(ends, (), (), wait)
        now = time.monotonic()
        for end in readable:
            packet = os.read(end, 65536)
            if chance.random() >= loss:
                on_the_way.append((now + delay, other[end], packet))
        while on_the_way and on_the_way[0][0] <= now:
            _, end, packet = on_the_way.popleft()
            with suppress(OSError):  # an interface that is down loses packets, as a cable does
                os.write(end, packet)


if __name__ == "__main__":
    interface, delay_ms, loss, *namespaces = sys.argv[1:]
    first, second = (tap(interface, namespace) for namespace in namespaces)
    print("ready", flush=True)
    carry((first, second), float(delay_ms) / 1000.0, float(loss))
