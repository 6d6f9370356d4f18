"""Two nodes on one machine: network, process, mount, host-name and IPC namespaces of their own, and an sshd in each.

They share the file system, as a cluster shares its home folders. Apart are: `/dev/shm`, `~/.ssh`, `/etc/hosts`, and a
folder `private` that each node sees with content of its own. Needs root and Debian's iproute2, openssh-server,
openssh-client and pdsh; `why_not` says what is missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "pdsh")
SSHD = "/usr/sbin/sshd"
INTERFACE = "rs0"
APART = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")
CLIENT = "Host rs-a rs-b 10.231.0.*\n StrictHostKeyChecking yes\n BatchMode yes\n ConnectTimeout 10\n"
SERVER = """Port 22
ListenAddress {address}
HostKey {folder}/host_{name}
PidFile none
AuthorizedKeysFile /root/.ssh/authorized_keys
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
MaxStartups 64
"""


def why_not() -> str:
    """Why this machine cannot hold the two nodes; empty: it can."""
    if os.geteuid() != 0:
        return "two nodes need root, to make namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name) is None] + [SSHD] * (not Path(SSHD).exists())
    if missing:
        return f"two nodes need {', '.join(missing)}: apt-get install iproute2 openssh-server openssh-client pdsh"
    script = "ip link add veth0 type veth peer name veth1 && mount -t tmpfs none /dev/shm && hostname x"
    tried = subprocess.run(
        [*APART, "sh", "-c", script],
        capture_output=True,
        text=True,
    )
    return "" if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.strip()}"


@dataclass
class Node:
    """One node. `init` is process 1 of its process namespace, as this machine numbers it."""

    name: str
    address: str
    init: int = 0
    outer: subprocess.Popen | None = None

    def enter(self, *namespaces: str) -> list[str]:
        """The words that run a command inside; without `namespaces` inside all of them."""
        chosen = namespaces or ("net", "pid", "mount", "uts", "ipc")
        return ["nsenter", "-t", str(self.init), *(f"--{each}" for each in chosen)]


@dataclass
class TwoNodes:
    """The pair. A context manager; `folder` must be on the shared file system."""

    folder: Path
    a: Node = field(default_factory=lambda: Node("rs-a", "10.231.0.1"))
    b: Node = field(default_factory=lambda: Node("rs-b", "10.231.0.2"))
    _relay: subprocess.Popen | None = None

    def __enter__(self) -> TwoNodes:
        try:
            self._write_files()
            for node in (self.a, self.b):
                self._boot(node)
            self._join()
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in (self.a, self.b):
            with suppress(ProcessLookupError):
                if node.init:
                    os.kill(node.init, signal.SIGKILL)  # the kernel ends everything in its process namespace
            if node.outer is not None:
                node.outer.kill()
                node.outer.wait()
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()

    @property
    def private(self) -> Path:
        """A folder that both nodes have, each its own."""
        return self.folder / "private"

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    def start(
        self, node: Node, command: Sequence[object], cwd: Path | str = "/", output: Path | None = None, **more: str
    ) -> subprocess.Popen:
        """Starts a command inside a node; its output goes to the file `output`."""
        sink = output.open("ab") if output else subprocess.DEVNULL
        return subprocess.Popen(
            [*node.enter(), "env", "-C", str(cwd), *map(str, command)],
            env=environment(more),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, node: Node, *command: object, cwd: Path | str = "/", **more: str) -> subprocess.CompletedProcess:
        """Runs a command inside a node to its end; its output comes back as text."""
        return subprocess.run(
            [*node.enter(), "env", "-C", str(cwd), *map(str, command)],
            env=environment(more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def processes(self, *words: str) -> dict[str, dict[int, str]]:
        """Command lines of the nodes' processes that contain one of `words`, by node and this machine's process id."""
        found: dict[str, dict[int, str]] = {}
        for node in (self.a, self.b):
            space = _namespace(node.init)
            here = {}
            for folder in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if _namespace(int(folder.name)) == space and any(word in line for word in words):
                        here[int(folder.name)] = line
            found[node.name] = here
        return found

    def part(self) -> None:
        """Takes node B off the network."""
        self._ip(self.b, "link", "set", INTERFACE, "down")

    def rejoin(self) -> None:
        self._ip(self.b, "link", "set", INTERFACE, "up")

    def slow_link(self, delay_ms: float, loss: float) -> None:
        """Each packet between the nodes is late by `delay_ms` and lost with probability `loss`, in both directions.

        A process of ours carries the packets (relay.py): the kernel's netem is a module that containers often lack.
        """
        for node in (self.a, self.b):
            self._ip(node, "link", "set", INTERFACE, "down")
            self._ip(node, "link", "set", INTERFACE, "name", "fast0")
            self._ip(node, "addr", "flush", "dev", "fast0")
        words = [f"/proc/{node.init}/ns/net" for node in (self.a, self.b)]
        self._relay = subprocess.Popen(
            [sys.executable, HERE / "relay.py", INTERFACE, str(delay_ms), str(loss), *words],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._relay.stdout.readline() == "ready\n"
        for node in (self.a, self.b):
            self._address(node)

    def fast_link(self) -> None:
        """Undoes `slow_link`."""
        if self._relay is None:
            return
        self._relay.kill()  # its interfaces go with it
        self._relay.wait()
        self._relay = None
        for node in (self.a, self.b):
            self._ip(node, "link", "set", "fast0", "name", INTERFACE)
            self._address(node)

    # Below: how they come up.

    def _write_files(self) -> None:
        ssh = self.folder / "ssh"
        ssh.mkdir(parents=True, mode=0o700)
        self.private.mkdir()
        _key(ssh / "id_ed25519")
        (ssh / "authorized_keys").write_text((ssh / "id_ed25519.pub").read_text())
        (ssh / "config").write_text(CLIENT)
        known = ""
        for node in (self.a, self.b):
            _key(self.folder / f"host_{node.name}")
            public = " ".join((self.folder / f"host_{node.name}.pub").read_text().split()[:2])
            known += f"{node.address},{node.name} {public}\n"
            (self.folder / f"sshd_{node.name}.conf").write_text(
                SERVER.format(address=node.address, folder=self.folder, name=node.name)
            )
        (ssh / "known_hosts").write_text(known)
        for file in ssh.iterdir():
            file.chmod(0o600)
        names = "".join(f"{node.address} {node.name}\n" for node in (self.a, self.b))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        self.hostfile.write_text("rs-a slots=1\nrs-b slots=1\n")

    def _boot(self, node: Node) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        Path("/root/.ssh").mkdir(exist_ok=True, mode=0o700)  # where the node's own is mounted
        name, folder = node.name, self.folder
        script = (
            f"set -e; hostname {name}; mount --bind {folder}/ssh /root/.ssh; mount --bind {folder}/hosts /etc/hosts;"
            f"mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm; mount -t tmpfs tmpfs {folder}/private;"
            f"ip link set lo up; read go; exec {SSHD} -D -f {folder}/sshd_{name}.conf -E {folder}/sshd_{name}.log"
        )
        node.outer = subprocess.Popen(
            [*APART, "--kill-child", "bash", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"boot_{node.name}.log").open("w"),
        )
        children = Path(f"/proc/{node.outer.pid}/task/{node.outer.pid}/children")
        node.init = int(_until(lambda: children.read_text().split(), f"{node.name} did not start")[0])
        _until(lambda: _namespace(node.init, "net") != _namespace(os.getpid(), "net"), "no network namespace")

    def _join(self) -> None:
        """A cable between the two, and then the sshds."""
        peer = ("type", "veth", "peer", "name", INTERFACE, "netns", str(self.b.init))
        self._ip(self.a, "link", "add", INTERFACE, *peer)
        for node in (self.a, self.b):
            self._address(node)
            node.outer.stdin.write(b"go\n")
            node.outer.stdin.flush()

    def _address(self, node: Node) -> None:
        self._ip(node, "addr", "add", f"{node.address}/24", "dev", INTERFACE)
        self._ip(node, "link", "set", INTERFACE, "up")

    def _ip(self, node: Node, *words: str) -> None:
        subprocess.run([*node.enter("net"), "ip", *words], check=True)

    def _wait(self) -> None:
        for here, there in ((self.a, self.b), (self.b, self.a)):
            knock = [*here.enter("net"), "bash", "-c", f"exec 3<>/dev/tcp/{there.address}/22"]
            _until(lambda knock=knock: subprocess.run(knock, capture_output=True).returncode == 0, "no sshd answers")


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """A plain environment, as after a log-in, and `more`."""
    kept = ("PATH", "HOME", "LANG", "USER")
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        **more,
    }


def free_port(node: Node) -> int:
    """A port that is free now on this machine, so very likely in the node too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _namespace(pid: int, kind: str = "pid") -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def _key(file: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "two-nodes", "-f", file], check=True)


def _until(condition, otherwise: str, seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise RuntimeError(f"two nodes: {otherwise} in {seconds:.0f} s")
