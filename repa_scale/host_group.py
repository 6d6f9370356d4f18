"""The ranks' hosts as a group of their own, on gloo, also beside NCCL: for barriers and objects.

What waits for one rank's host, such as for a checkpoint that rank 0 fetches for hours, is no collective of the device
then, and objects do not travel through the device's memory.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from repa_scale import timeouts
from repa_scale.errors import UserError, reason

CONNECT = timedelta(seconds=timeouts.CONNECT)

_group: dist.ProcessGroup | None = None  # None: the default group


def open_group() -> None:
    """Opens it beside the default group; all ranks call it together.

    Raises:
        UserError: the hosts cannot connect to each other.
    """
    global _group
    choose_interface()
    with connecting():
        _group = dist.new_group(backend="gloo", timeout=CONNECT, group_desc="host")
    _group.bound_device_id = None  # taken over from the default group; collectives of this one stay on the host
    set_timeout(timedelta(seconds=timeouts.HOST), _group)


def forget() -> None:
    """The process group is gone."""
    global _group
    _group = None


def barrier() -> None:
    dist.all_reduce(torch.zeros(1), group=_group)


def broadcast(value: object) -> object:
    """Rank 0's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_group)
    return box[0]


def gather(value: object) -> list:
    """Every rank's `value`, in the order of the ranks, on every rank."""
    boxes: list = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value, group=_group)
    return boxes


def choose_interface(environment: MutableMapping[str, str] = os.environ) -> None:
    """gloo takes the address of this node's name, which may be another network's: where NCCL was told an interface of
    this node, gloo takes the same, unless it was told one too."""
    name = environment.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if name in [known for _, known in socket.if_nameindex()]:
        environment.setdefault("GLOO_SOCKET_IFNAME", name)


@contextmanager
def connecting() -> Iterator[None]:
    """Around what connects the hosts, with the timeout CONNECT: with the group's own it would wait for days."""
    try:
        yield
    except RuntimeError as error:
        name = platform.node()
        now = os.environ.get("GLOO_SOCKET_IFNAME") or f"that of the name {name}"
        raise UserError(
            f"{name} cannot connect to the other ranks over gloo ({reason(error)}); set GLOO_SOCKET_IFNAME to the "
            f"interface of the network between the nodes (now {now}), and open its ports"
        ) from None


def set_timeout(timeout: timedelta, group: dist.ProcessGroup | None = None) -> None:
    """From here on, of a group of gloo that has connected."""
    dist.distributed_c10d._set_pg_timeout(timeout, group)
