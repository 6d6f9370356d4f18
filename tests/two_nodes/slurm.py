"""A real Slurm on the two nodes: munged and slurmctld on node A, a slurmd on each. Needs slurm-wlm and munge."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from nodes import TwoNodes, environment

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "munged")
CONFIG = """ClusterName=two-nodes
SlurmctldHost=rs-a
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobRequeue=1
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=rs-a NodeAddr=10.231.0.1 CPUs=2 Gres=gpu:1
NodeName=rs-b NodeAddr=10.231.0.2 CPUs=2 Gres=gpu:1
PartitionName=all Nodes=rs-a,rs-b Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why there can be no Slurm here; empty: there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"Slurm needs {', '.join(missing)}: apt-get install slurm-wlm munge" if missing else ""


class Slurm:
    """A context manager. Jobs run as root, and see the working folder that `sbatch` was called in."""

    def __init__(self, nodes: TwoNodes, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Slurm:
        folder = self.folder
        folder.mkdir(mode=0o755)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder))
        (folder / "gres.conf").write_text("NodeName=rs-a,rs-b Name=gpu File=/dev/null\n")
        munge = ["munged", "--foreground", "--force", "--num-threads=2", f"--key-file={folder}/munge.key"]
        munge += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
        munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
        a, b = self.nodes.a, self.nodes.b
        try:
            self._start(a, *munge)
            self._until(lambda: (folder / "munge.socket").exists(), "munged")
            self._start(a, "slurmctld", "-D")
            for node in (a, b):
                self._start(node, "slurmd", "-D", "-N", node.name)
            self._until(lambda: self.call("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", "slurmd")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self.daemons):
            subprocess.run(["kill", "-TERM", "--", f"-{daemon.pid}"], capture_output=True)
        for daemon in self.daemons:
            daemon.wait()

    def call(self, *command: object, cwd: Path | str = "/", **more: str) -> str:
        """A command of Slurm's in node A; its output."""
        done = self.nodes.run(self.nodes.a, *command, cwd=cwd, SLURM_CONF=str(self.folder / "slurm.conf"), **more)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ...; of a job array all states."""
        lines = self.call("scontrol", "--oneliner", "show", "job", job)
        return " ".join(word.removeprefix("JobState=") for word in lines.split() if word.startswith("JobState="))

    def wait_for(self, job: str, state: str, seconds: float) -> None:
        self._until(lambda: self.state(job) == state, f"job {job}: {state}, but {self.state(job)}", seconds)

    def _start(self, node, *command: str) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin"
        log = (self.folder / f"{Path(command[0]).name}-{node.name}.out").open("wb")
        self.daemons.append(
            subprocess.Popen(
                [*node.enter(), *command],
                env=environment({"PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,
            )
        )

    def _until(self, condition, what: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.[ol]*[tg]"))
            assert time.monotonic() < deadline, f"{what} in {seconds:.0f} s\n{logs}"
            time.sleep(0.2)
