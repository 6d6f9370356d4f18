"""Checks of a node itself: limits of its processes, shared memory, the disk for checkpoints, the meeting port."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import time
import uuid
from pathlib import Path

from repa_scale.doctor.finding import FAIL, NOTE, OK, WARN, Finding, Look

FILES = 4096  # open files: sockets of every pair of ranks, shards, loader processes
PROCESSES = 4096
SHM_LEAST = 128 << 20  # a container's default of 64 MB is too little for loader processes and NCCL
WRITE_SECONDS, WRITE_MOST = 1.5, 256 << 20
SLOW_DISK = 0.1e9  # bytes a second
INFINIBAND = Path("/sys/class/infiniband")


def limits(look: Look) -> list[Finding]:
    """Soft limits, as a process gets them that came the same way as the run's."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    words = f"{_amount(files)} files, {_amount(processes)} processes, {_amount(locked)} bytes of locked memory"
    if 0 <= files < FILES:
        remedy = (
            f"`* soft nofile 1048576` (and hard) in /etc/security/limits.conf, or LimitNOFILE of sshd; at least {FILES}"
        )
        return [Finding("limits", FAIL, f"ulimit -n {files}", remedy)]
    if 0 <= processes < PROCESSES:
        remedy = f"`* soft nproc unlimited` in /etc/security/limits.conf; at least {PROCESSES}"
        return [Finding("limits", FAIL, f"ulimit -u {processes}", remedy)]
    if INFINIBAND.is_dir() and any(INFINIBAND.iterdir()) and locked != resource.RLIM_INFINITY:
        remedy = "`* soft memlock unlimited` (and hard) in /etc/security/limits.conf, docker run --ulimit memlock=-1"
        return [Finding("limits", FAIL, f"InfiniBand, but ulimit -l {locked // 1024} KiB", remedy)]
    return [Finding("limits", OK, words)]


def _amount(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def shared_memory(look: Look) -> list[Finding]:
    """`/dev/shm`, through which loader processes hand over their batches."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return [Finding("shm", FAIL, f"/dev/shm: {error.strerror}", "mount -t tmpfs tmpfs /dev/shm")]
    need = max(SHM_LEAST, _batches_in_shm(look))
    if not os.access("/dev/shm", os.W_OK):
        return [Finding("shm", FAIL, "/dev/shm is not writable", "chmod 1777 /dev/shm")]
    if free < need:
        remedy = f"give it {need / 1e9:.1f} GB: mount -o remount,size=..., docker run --shm-size, an emptyDir in memory"
        return [Finding("shm", FAIL, f"{free / 1e9:.3f} GB free in /dev/shm, {need / 1e9:.3f} GB needed", remedy)]
    return [Finding("shm", OK, f"{free / 1e9:.1f} GB free")]


def _batches_in_shm(look: Look) -> int:
    """Bytes of the batches that the loaders of a node keep ready."""
    if look.config is None:
        return 0
    data, train = look.config["data"], look.config["train"]
    ranks = look.slots or 8
    micro = train["micro_batch"] or max(1, train["global_batch"] // (ranks * look.nodes))
    return 2 * ranks * max(1, data["workers"]) * micro * 3 * data["image_size"] ** 2


def disk(look: Look) -> list[Finding]:
    """Space and speed of writing where the run's folder lies; whether all nodes see the same folder."""
    folder = existing(Path(look.run_dir))
    where = f"{folder}" if str(folder) == look.run_dir else f"{folder} (of {look.run_dir})"
    probe = folder / f".repa-scale-doctor-{uuid.uuid4().hex}"
    free = shutil.disk_usage(folder).free
    remedy = "choose another run.dir, or make room"
    try:
        rate = _written(probe, min(WRITE_MOST, free // 4))
    except OSError as error:
        return [Finding("disk", FAIL, f"{where} cannot be written: {error.strerror}", remedy)]
    finally:
        probe.unlink(missing_ok=True)
    seconds = look.checkpoint_bytes / look.nodes / rate
    words = f"{where}: {free / 1e9:.1f} GB free, written at {rate / 1e9:.2f} GB/s"
    if look.checkpoint_bytes:
        words += f"; a checkpoint of {look.checkpoint_bytes / 1e9:.2f} GB takes {seconds:.1f} s"
    findings = []
    if free < 2 * look.checkpoint_bytes:  # the new one is written before an old one may go
        findings.append(
            Finding("disk", FAIL, words, f"two checkpoints need {2 * look.checkpoint_bytes / 1e9:.2f} GB: {remedy}")
        )
    elif free < look.kept_bytes:
        need = f"all checkpoints of the run take {look.kept_bytes / 1e9:.1f} GB: set checkpoint.keep_last, or make room"
        findings.append(Finding("disk", WARN, words, need))
    elif rate < SLOW_DISK:
        findings.append(Finding("disk", WARN, words, "put run.dir on a faster disk, or save less often"))
    else:
        findings.append(Finding("disk", OK, words))
    if look.marker and not Path(look.marker).exists():
        text = f"{look.run_dir} is not the folder that this command sees"
        findings.append(Finding("shared folder", FAIL, text, "put run.dir on a file system that all nodes mount"))
    elif look.marker:
        findings.append(Finding("shared folder", OK, "run.dir is the same folder everywhere"))
    return findings


def own_name(look: Look) -> list[Finding]:
    """Whether this node's name leads to an address that other nodes can reach: gloo binds to it."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = ""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    known = [name for _, name in socket.if_nameindex()]
    if interface and not set(interface.split(",")) & set(known):
        found = f"GLOO_SOCKET_IFNAME={interface}, but this node has {', '.join(known)}"
        return [Finding("name", FAIL, found, "set the interface of the cluster's network")]
    if look.nodes > 1 and not interface and (not address or address.startswith("127.")):
        found = f"{name} is {address or 'unknown'} here, where other nodes cannot connect to"
        remedy = "give it its address in /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        return [Finding("name", FAIL, found, remedy)]
    return [Finding("name", OK, f"{name}, {interface or address or 'no address'}")]


def existing(path: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    while not path.is_dir():
        path = path.parent
    return path


def _written(file: Path, most: int) -> float:
    """Bytes a second that reach the disk."""
    block = os.urandom(1 << 22)
    began, done = time.perf_counter(), 0
    with file.open("wb", buffering=0) as sink:
        while done == 0 or (done < most and time.perf_counter() - began < WRITE_SECONDS):
            done += sink.write(block)
        os.fsync(sink.fileno())
    return done / (time.perf_counter() - began)


def port(look: Look) -> list[Finding]:
    """The port on which the ranks meet, on the first node."""
    if not look.first:
        return []
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", look.port))
        except OSError as error:
            remedy = "end what listens there (`ss -ltnp`), or give another --master_port"
            return [Finding("port", FAIL, f"port {look.port} cannot be had: {error.strerror}", remedy)]
        number = probe.getsockname()[1]
    return [Finding("port", OK if look.port else NOTE, f"{number} is free")]
