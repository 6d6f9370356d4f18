"""Compiler caches of this node: on a disk of its own where their usual place is on a network file system.

All ranks of a job compile the same kernels at the same time. In a home folder on NFS each file of that is a round trip,
and renames that others do not see yet are errors of compilers. Standard library alone.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

# variable -> its default, below the home folder, or the one for temporary files where it begins with TMP.
CACHES = {
    "TRITON_CACHE_DIR": ".triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": "TMP/torchinductor",
    "TORCH_EXTENSIONS_DIR": ".cache/torch_extensions",  # of DeepSpeed's operators
    "CUDA_CACHE_PATH": ".nv/ComputeCache",
}
NETWORK = (
    *("nfs", "nfs4", "lustre", "cifs", "smb3", "smbfs", "gpfs", "beegfs", "ceph", "glusterfs", "wekafs", "9p", "afs"),
    *("pvfs2", "orangefs", "panfs", "ocfs2", "gfs2", "virtiofs", "davfs", "mmfs", "vastnfs"),
)
LOCAL_FUSE = ("fuse.fuse-overlayfs",)  # of containers without root; any other FUSE is taken for a network's
# An unused cache is emptied after this long: nothing in it says which entries are still of use.
RENEW_SECONDS = 30 * 86400.0
MOUNTS = Path("/proc/self/mountinfo")
_locks: list = []  # held until the process ends


def use_local_caches(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Sets each variable of CACHES whose default is on a network file system, and which the user has not set.

    The folder belongs to the user, is shared by all ranks of the node, and stays: a run that is started again, or the
    next one, finds its kernels compiled. Call it before anything compiles.

    Returns:
        The folder; None where no variable was set.
    """
    mounts = _mounts()
    home = Path(environment.get("HOME") or "/")
    temporary = Path(environment.get("TMPDIR") or tempfile.gettempdir())
    places = {name: temporary if usual.startswith("TMP/") else home / usual for name, usual in CACHES.items()}
    if "TRITON_HOME" in environment:
        places["TRITON_CACHE_DIR"] = Path(environment["TRITON_HOME"])
    remote = [name for name in CACHES if name not in environment and _is_network(_mount_of(places[name], mounts)[0])]
    if not remote:
        return None
    for base in dict.fromkeys((temporary, Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))):
        kind, options = _mount_of(base, mounts)
        if not _is_network(kind) and "noexec" not in options and (folder := _own_folder(base)):
            environment.update({name: str(folder / name.lower()) for name in remote})
            return folder
    return None


def _own_folder(base: Path) -> Path | None:
    """A folder in `base` that this user alone can write, locked as in use; None where there can be none.

    Programs are loaded from it, so one that somebody else has made, or could write to, is not used.
    """
    folder = base / f"repa-scale-cache-{os.getuid()}"
    with suppress(OSError):
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o170077 != 0o040000:
            return None
        lock = (folder / "lock").open("a")
        _renew(folder, lock)
        fcntl.flock(lock, fcntl.LOCK_SH)
        _locks.append(lock)
        return folder
    return None


def _renew(folder: Path, lock) -> None:
    """Empties an old cache, unless a process uses it."""
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        begun = folder / "begun"
        if begun.exists() and time.time() - begun.stat().st_mtime > RENEW_SECONDS:
            for name in CACHES:
                shutil.rmtree(folder / name.lower(), ignore_errors=True)
            begun.unlink()
        if not begun.exists():
            begun.touch()


def _mounts() -> list[tuple[Path, str, str]]:
    """Place, kind and options of all mounts; a later one covers an earlier one."""
    found = []
    with suppress(OSError):
        for line in os.fsdecode(MOUNTS.read_bytes()).split("\n"):
            before, _, after = line.partition(" - ")
            words, kind = before.split(" "), after.split(" ")
            if len(words) > 5 and kind:
                place = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[4])  # blanks are \040
                found.append((Path(place), kind[0], words[5]))
    return found


def _mount_of(path: Path, mounts: list[tuple[Path, str, str]]) -> tuple[str, str]:
    """Kind and options of the file system that holds `path`, or will."""
    real = Path(os.path.realpath(path))
    best: tuple[int, str, str] = (-1, "", "")
    for place, kind, options in mounts:
        if (real == place or place in real.parents) and len(place.parts) >= best[0]:
            best = (len(place.parts), kind, options)
    return best[1], best[2]


def _is_network(kind: str) -> bool:
    return kind in NETWORK or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)
