"""What `deepspeed` starts as a rank: a small process that starts the training (entry.py) and stays beside it.

It gives the rank's output a prefix and a file of its own, tells the guard how the rank ended, whatever ended it, and
ends the rank when `launch.py` or the guard is gone. Standard library alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from repa_scale.launch.environment import at_start, secrets
from repa_scale.launch.places import JOB, JOB_FILE, LOCK_FILE, node_folder, write_private
from repa_scale.processes import WISHES, die_with_parent, hear_again

POLL_SECONDS = 0.5
GONE = 70


def main(argv: list[str]) -> int:
    """argv: the job's id. The node's number comes from `launch.py`, in CROSS_RANK."""
    folder = node_folder(argv[0], int(os.environ.get("CROSS_RANK", 0)))
    rank = int(os.environ["RANK"])
    write_private(folder / f"wrapper_pid_{rank}.json", json.dumps({"pid": os.getpid()}))
    for number in WISHES:
        signal.signal(number, signal.SIG_IGN)  # the rank gets it too, and decides
    job = json.loads((folder / JOB_FILE).read_text())
    variables = at_start(job["environment"])
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}  # deepspeed's additions
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "repa_scale.launch.entry", str(folder)],
        env={**environment, **variables, JOB: argv[0]},
        cwd="/",  # Python looks for modules where it is started
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=_take_signals,
    )
    masked = [value.encode() for value in secrets(job["environment"])]
    del job, variables
    with (folder / LOCK_FILE).open() as lock, _open_log(rank, folder) as log:
        why = _stay_beside(process, rank, lock, log, masked)
    code = process.wait()
    ended = {"code": code, "what": why or _describe(code)}
    with suppress(OSError):
        write_private(folder / f"exit_{rank}.json", json.dumps(ended))
    return GONE if why else (code if code >= 0 else 128 - code)


def _take_signals() -> None:
    """In the child: it hears the signals to which its parent is deaf."""
    hear_again()
    die_with_parent()


def _open_log(rank: int, folder: Path):
    """RUN/log/console_rank_N.log, or nothing where it cannot be written."""
    try:
        run_dir = (folder / "run_dir").read_text()
        return (Path(run_dir) / "log" / f"console_rank_{rank}.log").open("ab", buffering=0)
    except OSError:
        return open(os.devnull, "wb", buffering=0)


def _stay_beside(process: subprocess.Popen, rank: int, lock, log, masked: list[bytes]) -> str:
    """Copies the rank's output until it ends. Returns why it was ended from here, if it was."""
    parent = os.getppid()
    source, rest, why = process.stdout.fileno(), b"", ""
    os.set_blocking(source, False)
    while True:
        ended = process.poll() is not None  # asked before the last read: what it wrote is all there
        readable, _, _ = select.select([source], [], [], 0 if ended else POLL_SECONDS)
        chunk = os.read(source, 1 << 16) if readable else b""
        *lines, rest = (rest + chunk).split(b"\n")
        if ended and not chunk:
            _copy([rest] if rest else [], rank, log, masked)
            return why
        _copy(lines, rank, log, masked)
        if readable and not chunk:
            process.wait()
        if not why:
            if os.getppid() != parent:
                why = "was ended, because launch.py on its node is gone"
            elif _is_free(lock):
                why = "was ended, because the guard on its node is gone"
            if why:
                process.kill()


def _copy(lines: list[bytes], rank: int, log, masked: list[bytes]) -> None:
    for line in lines:
        for secret in masked:
            line = line.replace(secret, b"***")
        with suppress(OSError):
            log.write(line + b"\n")
        with suppress(OSError):
            os.write(1, b"[rank %d] %s\n" % (rank, line))


def _is_free(lock) -> bool:
    """Whether nobody holds the guard's lock: the kernel gives it back when the guard ends, however it does."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(lock, fcntl.LOCK_UN)
    return True


def _describe(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
