"""One process a node that watches over the job's ranks there: `python -m repa_scale.launch.guard`, started over ssh.

It speaks JSON lines over stdin and stdout with the launcher. It brings the job's file to the node, passes signals on,
tells at once how a rank ended, and ends everything of the job (and nothing else) when it is told to, or when the
launcher is gone: its end of the connection closed, or nothing heard for a while. Standard library alone: it starts in
a tenth of a second.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import select
import shutil
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

from repa_scale.launch.code import code_hashes, versions
from repa_scale.launch.places import JOB, JOB_FILE, LOCK_FILE, node_folder, write_private
from repa_scale.launch.visible import VARIABLE
from repa_scale.processes import WISHES, Process, alive, end_all_marked, process_of

POLL_SECONDS = 0.2


class Guard:
    """The node's side of the connection."""

    def __init__(self) -> None:
        self.job, self.node, self.slots, self.lost_after = "", -1, 0, 60.0
        self.folder: Path | None = None
        self.signal = 0  # the last that was to be passed on
        self.told: set[int] = set()  # ranks whose end was told
        self.started: dict[int, int] = {}  # process id by rank
        self._known: list[Process] = []  # ranks
        self._heard = time.monotonic()
        self._rest = b""
        self._lock = None

    def run(self) -> None:
        """Until the launcher is gone, or says `end`. Leaves nothing behind."""
        for number in WISHES:
            signal.signal(number, signal.SIG_IGN)  # it ends with its job
        try:
            while self._serve():
                if self.folder is not None and self.slots:
                    self._look()
        except (BrokenPipeError, ConnectionError):
            pass
        finally:
            self._end_all()
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _serve(self) -> bool:
        """Waits a moment for words of the launcher and acts on them. False: it is gone."""
        readable, _, _ = select.select([0], [], [], POLL_SECONDS)
        if not readable:
            return time.monotonic() - self._heard < self.lost_after
        chunk = os.read(0, 1 << 20)
        if not chunk:
            return False
        self._heard = time.monotonic()
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            words = json.loads(line)
            action = words.pop("do")
            if action == "end":
                return False
            getattr(self, f"do_{action}")(**words)
        return True

    def say(self, event: str, **facts: object) -> None:
        data = (json.dumps({"event": event, **facts}) + "\n").encode()
        while data:
            data = data[os.write(1, data) :]

    # What the launcher can ask for.

    def do_ping(self) -> None:
        self.say("pong")

    def do_begin(self, job: str, node: int, slots: int, lost_after: float, cwd: str) -> None:
        """Makes the node's folder and says what the launcher must know of the node."""
        self.job, self.node, self.slots, self.lost_after = job, node, slots, lost_after
        self.folder = node_folder(job, node)
        self.folder.mkdir(mode=0o700)
        self._lock = (self.folder / LOCK_FILE).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        problem = "" if Path(cwd).is_dir() else f"has no folder {cwd}"
        self.say(
            "ready",
            host=platform.node(),
            problem=problem,
            code=code_hashes(),
            versions=versions(),
            address=_address(),
            port=_free_port(),
            visible=os.environ.get(VARIABLE),
        )

    def do_mark_run(self, run_dir: str, name: str) -> None:
        """Makes the run folder, with a file by which the other nodes see whether they share it."""
        made, problem = [], ""
        log = Path(run_dir) / "log"
        try:
            for folder in (*reversed(log.parents), log):
                if not folder.exists():
                    folder.mkdir()
                    made.append(str(folder))
            (Path(run_dir) / name).touch()
        except OSError as error:
            problem = f"cannot write run.dir={run_dir} ({error.strerror})"
        self.say("marked", made=made, problem=problem)

    def do_look_for(self, run_dir: str, name: str) -> None:
        """Whether this node sees the file that `do_mark_run` made on another; network file systems may be slow to."""
        until = time.monotonic() + 5.0
        seen = False
        while not seen and time.monotonic() < until:
            with suppress(OSError):
                seen = name in os.listdir(run_dir)
            if not seen:
                time.sleep(0.1)
        self.say("looked", seen=seen)

    def do_unmark_run(self, run_dir: str, name: str, made: list[str]) -> None:
        """Takes away the file, and the folders that were made for a run that did not begin."""
        with suppress(OSError):
            if name:
                (Path(run_dir) / name).unlink()
        if made and not (Path(run_dir) / "identity.json").exists():
            with suppress(OSError):
                for log in (*(Path(run_dir) / "log").glob("console_rank_*.log"), Path(run_dir) / "log" / "launch.log"):
                    log.unlink(missing_ok=True)
                for folder in reversed(made):
                    os.rmdir(folder)

    def do_files(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            write_private(self.folder / name, text)
        self.say("files")

    def do_signal(self, number: int) -> None:
        """To the ranks themselves, all at once: `launch.py` would pass it on to one after the other, with SIGKILL."""
        self.signal = number
        for rank, pid in self._pids("rank").items():
            if rank not in self.told:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def do_kill(self) -> None:
        self._end_all()
        self.say("killed")

    # What it watches.

    def _look(self) -> None:
        """Tells of ranks that started and that ended."""
        for rank, pid in self._pids("rank").items():
            if rank not in self.started:
                self.started[rank] = pid
                self._known += [process] if (process := process_of(pid)) else []
                self.say("started", rank=rank, pid=pid)
                if self.signal:  # it came before the rank
                    with suppress(ProcessLookupError):
                        os.kill(pid, self.signal)
                if len(self.started) == self.slots:  # all have read it
                    with suppress(OSError):
                        (self.folder / JOB_FILE).unlink()
        for rank, pid in self._pids("wrapper").items():
            if rank in self.told:
                continue
            ended = self._read(f"exit_{rank}.json")
            if ended is None and not alive(pid):
                ended = self._read(f"exit_{rank}.json") or {"code": None, "what": "was killed"}
            if ended is not None:
                self.told.add(rank)
                ended["error"] = (self._read(f"rank_{rank}.json") or {}).get("error", "")  # train.py leaves it
                self.say("ended", rank=rank, **ended)

    def _pids(self, kind: str) -> dict[int, int]:
        """Process ids that ranks, or their wrappers, have left in the folder."""
        found = {}
        for path in self.folder.glob(f"{kind}_pid_*.json"):
            rank = int(path.stem.rpartition("_")[2])
            if (facts := self._read(path.name)) is not None:
                found[rank] = facts["pid"]
        return found

    def _read(self, name: str) -> dict | None:
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def _end_all(self) -> None:
        """Ends all of the job; tells of processes that outlive their SIGKILL, and at the end of those still there."""
        if not self.job:
            return
        told: list[Process] = []

        def tell(left: list[Process]) -> None:
            told.extend(left)
            with suppress(OSError):  # the launcher is gone
                self.say("left", processes=[str(process) for process in left])

        left = end_all_marked(JOB, self.job, self._known, tell)
        if told:
            tell(left)


def _address() -> str:
    """The address by which this node is reached from the launcher, or the first that is not the loop's."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) == 4 and not words[2].startswith(("127.", "::1")):
        return words[2]
    with suppress(OSError):
        for *_, (address, *_) in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET):
            if not address.startswith("127."):
                return address
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; asks the routing table
        return probe.getsockname()[0]
    return "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    Guard().run()
