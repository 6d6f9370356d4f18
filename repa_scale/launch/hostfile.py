"""Which nodes a job runs on, and with which slots: the host file, and deepspeed's options that choose from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from repa_scale.errors import ConfigError, did_you_mean

# A name goes to pdsh, to ssh and into deepspeed's --include: no `-` in front, nothing that one of them would expand.
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Host:
    """A node of the job, and the numbers of the slots (GPUs) that it gives; `rank` is its place among the nodes."""

    name: str
    slots: tuple[int, ...]


def read_hostfile(path: Path) -> list[Host]:
    """The nodes of a host file: lines `NAME slots=N`; blank lines and what follows `#` are left out.

    Raises:
        ConfigError: the file or a line of it is wrong; the message has the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--hostfile {path} cannot be read: {error}; name a text file of lines `NAME slots=N`"
        ) from None
    hosts: dict[str, Host] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path} line {number}: {line.strip()!r}"
        if len(words) != 2 or not re.fullmatch(r"slots=\d+", words[1]):
            raise ConfigError(f"{where} is not of the form `NAME slots=N`")
        name, slots = words[0], int(words[1].partition("=")[2])
        if not HOST.fullmatch(name):
            raise ConfigError(
                f"{where}: {name!r} is not a host name (letters, digits, dots, dashes); "
                "users, ports and addresses belong into ~/.ssh/config"
            )
        if name in seen:
            raise ConfigError(f"{where}: {name} stands already in line {seen[name]}; give each node one line")
        if slots == 0:
            raise ConfigError(f"{where}: a node without slots does nothing; give it slots, or put a # in front")
        seen[name] = number
        hosts[name] = Host(name, tuple(range(slots)))
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no node; write lines such as `node-1 slots=8`")
    return list(hosts.values())


def choose(hosts: list[Host], include: str, exclude: str, num_nodes: int | None, num_gpus: int | None) -> list[Host]:
    """The part of `hosts` that the options leave, in their order.

    Args:
        include, exclude: `NODE[:SLOT,...]@NODE...`, as deepspeed reads them; empty: all, none.
        num_nodes, num_gpus: the first nodes, and the first slots of each; None: all.

    Raises:
        ConfigError: they contradict each other, or name what is not there.
    """
    if include and exclude:
        raise ConfigError("--include and --exclude were both given; give one of them")
    if (include or exclude) and (num_nodes or num_gpus):
        raise ConfigError(
            "--include and --exclude choose nodes and slots already; leave out --num_nodes and --num_gpus"
        )
    if include:
        named = _filter(include, "--include", hosts)
        hosts = [Host(h.name, tuple(named[h.name] or h.slots)) for h in hosts if h.name in named]
    if exclude:
        named = _filter(exclude, "--exclude", hosts)
        kept = [
            Host(h.name, tuple(s for s in h.slots if h.name not in named or (named[h.name] and s not in named[h.name])))
            for h in hosts
        ]
        hosts = [host for host in kept if host.slots]
        if not hosts:
            raise ConfigError(f"--exclude {exclude} leaves no node")
    if num_nodes is not None:
        if not 1 <= num_nodes <= len(hosts):
            raise ConfigError(f"--num_nodes {num_nodes}: the host file has {len(hosts)} nodes; give 1 to {len(hosts)}")
        hosts = hosts[:num_nodes]
    if num_gpus is not None:
        for host in hosts:
            if not 1 <= num_gpus <= len(host.slots):
                raise ConfigError(f"--num_gpus {num_gpus}: {host.name} has {len(host.slots)} slots in the host file")
        hosts = [Host(host.name, host.slots[:num_gpus]) for host in hosts]
    return hosts


def as_include(hosts: list[Host]) -> str:
    """`hosts` as deepspeed's --include."""
    return "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in hosts)


def as_hostfile(hosts: list[Host]) -> str:
    """The text of a host file from which `as_include` chooses."""
    return "".join(f"{host.name} slots={max(host.slots) + 1}\n" for host in hosts)


def _filter(text: str, option: str, hosts: list[Host]) -> dict[str, list[int]]:
    """Slots by node; an empty list stands for all of them."""
    known = {host.name: host.slots for host in hosts}
    chosen: dict[str, list[int]] = {}
    for part in text.split("@"):
        name, colon, numbers = part.partition(":")
        if name not in known:
            raise ConfigError(f"{option} {text}: {name!r} is not in the host file{did_you_mean(name, known)}")
        if colon and not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise ConfigError(f"{option} {text}: {part!r} is not of the form NODE:SLOT,SLOT")
        slots = sorted({int(number) for number in numbers.split(",")}) if colon else []
        for slot in slots:
            if slot not in known[name]:
                raise ConfigError(f"{option} {text}: {name} has the slots 0 to {max(known[name])}")
        chosen[name] = sorted({*chosen.get(name, []), *slots})
    return chosen
