"""The lease of a run folder: which one job writes there. It holds across nodes and containers, and trusts no clock."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path

from repa_scale.errors import UserError

WATCH_SECONDS = 25.0  # a lease of another machine that does not change for so long is dead, whatever the clocks say

log = logging.getLogger("repa_scale")


def holder_now(token: str) -> dict:
    return {
        "token": token,
        "beat": time.monotonic_ns(),  # changes with every heartbeat; its value means nothing
        "host": platform.node(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "boot_id": boot_id(),
        "pid_namespace": pid_namespace(),
        "updated": time.time(),
    }


def live_holder(path: Path) -> dict | None:
    """The holder of the lease of the run folder `path`, if it is alive."""
    lease, alive = look(path)
    return lease if alive else None


def look(path: Path) -> tuple[dict, bool]:
    """The lease ({}: none) and whether its holder lives: seen from the same machine by its process, elsewhere by its
    heartbeat. No clock of another machine is trusted: a lease that does not change while we watch it is dead.
    """
    lease = read_lease(path)
    if not lease:
        return {}, False
    here = (platform.node(), boot_id(), pid_namespace())
    if (lease.get("host"), lease.get("boot_id"), lease.get("pid_namespace", here[2])) == here:
        pid = lease.get("pid", 0)
        return lease, pid != os.getpid() and process_start(pid) == lease.get("process_start") is not None
    log.warning("run.dir=%s: waiting %.0f s for a sign of life of %s", path, WATCH_SECONDS, lease.get("host"))
    until = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < until:
        time.sleep(0.25)
        now = read_lease(path)
        if now != lease:
            return now, bool(now)
    return lease, False


def read_lease(path: Path) -> dict:
    """The lease of a run folder, or {} where there is none that can be read."""
    return _read(path / "lease.json")


def _read(file: Path) -> dict:
    try:
        lease = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return lease if isinstance(lease, dict) else {}


def pid_namespace() -> str:
    """Where process ids have their meaning: containers of one machine have one each."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def take_lease(path: Path, dead: dict) -> None:
    """Creates lease.json where there is none; takes that of the `dead` holder away first. Of several that try, one
    succeeds. Process ids are not in the names: two containers may have the same."""
    lease = path / "lease.json"
    token = uuid.uuid4().hex
    mine, aside = path / f"lease.json.new-{token}", path / f"lease.json.dead-{token}"
    mine.write_text(json.dumps(holder_now(token)))
    try:
        with suppress(FileNotFoundError):
            if lease.exists():
                lease.rename(aside)
                if _read(aside) != dead:  # another has just taken it: give it back
                    os.link(aside, lease)
        os.link(mine, lease)
    except FileExistsError:
        raise UserError(f"run.dir={path} was taken by another process at the same moment; try again") from None
    finally:
        mine.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)


def process_start(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None: there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
