"""A job on its nodes, from the first connection to the exit code: `repa-scale launch`, once it has its plan."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from repa_scale.errors import LOST, ExitCode, UserError
from repa_scale.launch import visible
from repa_scale.launch.channel import Channel, await_all
from repa_scale.launch.code import code_hashes, difference, versions
from repa_scale.launch.environment import plain, secrets
from repa_scale.launch.hostfile import Host, as_hostfile, as_include
from repa_scale.launch.places import CONFIG_FILE, JOB, JOB_FILE
from repa_scale.processes import REMEDY, STUCK_SECONDS, start_deaf

PING_SECONDS = 1.0
CONNECT_SECONDS = 60.0
START_SECONDS = 600.0  # until every rank has started Python
CAUSE_SECONDS = 1.5  # that a rank which lost another one gives it to be told of
FOLLOW_SECONDS = 3.0  # after a rank failed: for the others to say why they end
LEAVE_SECONDS = 60.0  # after a rank ended well: for the others to end well too
LAUNCHER_SECONDS = 15.0  # after the last rank ended: for deepspeed to notice
WELL = (ExitCode.COMPLETED, ExitCode.PREEMPTED)
SAFE = re.compile(r"[\w@+=:,./-]+")  # what a shell and pdsh leave as it is
LINE = re.compile(r"(?:(\S+): )?\[rank (\d+)\] (.*)", re.DOTALL)


@dataclass(frozen=True)
class Plan:
    """What is to run, and where.

    Attributes:
        hosts: the nodes, in their order; without `ssh` only `hosts[node_rank]` is this machine.
        ssh: by a host file, over ssh and pdsh; otherwise on this machine.
        no_ssh: this machine is one of the nodes, and each is started on its own.
        master: address and port; empty and 0: the first node chooses.
        config: the frozen configuration, YAML.
        words: the run's keys as they were typed.
        variables: of the ranks.
        visible: CUDA_VISIBLE_DEVICES as the launcher was told for all its nodes; None: each node's own counts.
        grace_seconds: how long a rank may take to save.
        lost_after: seconds of silence after which a node counts as lost.
    """

    hosts: list[Host]
    ssh: bool
    no_ssh: bool
    node_rank: int
    master: tuple[str, int]
    config: str
    run_dir: Path
    cwd: Path
    words: list[str]
    variables: dict[str, str]
    grace_seconds: float
    lost_after: float
    visible: str | None = None

    def ranks_of(self, node: int) -> range:
        first = sum(len(host.slots) for host in self.hosts[:node])
        return range(first, first + len(self.hosts[node].slots))

    def nodes(self) -> list[int]:
        """Those that this launcher watches over."""
        return [self.node_rank] if self.no_ssh else list(range(len(self.hosts)))

    def host_of(self, rank: int) -> str:
        return next(host.name for node, host in enumerate(self.hosts) if rank in self.ranks_of(node))


@dataclass
class Job:
    """One start of a plan. `run` returns the run's exit code."""

    plan: Plan
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    inbox: queue.Queue = field(default_factory=queue.Queue)
    channels: list[Channel] = field(default_factory=list)
    ended: dict[int, dict] = field(default_factory=dict)  # how, by rank
    started: set[int] = field(default_factory=set)
    problem: str = ""  # the first thing that went wrong
    error: str = ""  # of the rank that went wrong, in one line
    left: list[str] = field(default_factory=list)  # processes that could not be ended
    _signals: list[int] = field(default_factory=list)
    _log: object = None

    def run(self) -> int:
        """Connects, starts, watches, and leaves nothing behind on any node.

        Raises:
            UserError: a node cannot be used as it is; nothing was started.
            NodeError: a node cannot be reached.
        """
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGUSR1)}
        before[signal.SIGINT] = signal.signal(signal.SIGINT, self._receive)
        folder = Path(tempfile.mkdtemp(prefix="repa-scale-launch-"))
        process, made, code = None, [], ExitCode.FAILED
        try:
            made = self._prepare()
            if self._signals:
                return ExitCode.PREEMPTED
            self._log = (self.plan.run_dir / "log" / "launch.log").open("a") if self._sees_run() else None
            process = self._start(folder)
            self._watch(process)
            code = self._verdict()
            return code
        except UserError:
            code = ExitCode.BAD_INPUT
            raise
        finally:
            if made and code == ExitCode.BAD_INPUT:
                self._nodes()[0].tell("unmark_run", run_dir=str(self.plan.run_dir), name="", made=made)
            self._close(process)
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        self._signals.append(number)

    # Before the start.

    def _prepare(self) -> list[str]:
        """Connects to all nodes, compares them, and brings the job there. Returns the folders made for the run."""
        plan = self.plan
        if plan.ssh:
            self.channels = [Channel(host.name, node, self.inbox) for node, host in enumerate(plan.hosts)]
            self.channels.append(Channel("", -1, self.inbox))  # for deepspeed, pdsh and ssh on this machine
        else:
            self.channels = [Channel("", plan.node_rank, self.inbox)]
        for channel in self.channels:
            slots = len(plan.hosts[channel.node].slots) if channel.node >= 0 else 0
            facts = {"job": self.id, "slots": slots, "lost_after": plan.lost_after, "cwd": str(plan.cwd)}
            channel.tell("begin", node=channel.node, **facts)
        await_all(self.channels, "ready", CONNECT_SECONDS)
        self._compare()
        own = os.environ.get(visible.VARIABLE, "0")
        if plan.ssh and own != ",".join(map(str, range(own.count(",") + 1))):
            say(f"{visible.VARIABLE}={own} is of this machine alone; each node has its own, and the host file's slots")
        nodes = self._nodes()
        run = {"run_dir": str(plan.run_dir), "name": f".launch-{self.id}"}
        self._ask(nodes[:1], "mark_run", "marked", **run)
        made = nodes[0].facts["made"]
        try:
            if problem := nodes[0].facts["problem"]:
                raise UserError(f"{nodes[0].name} {problem}; choose another run.dir")
            self._ask(nodes, "look_for", "looked", **run)
            apart = [channel.name for channel in nodes if not channel.facts["seen"]]
            if apart:
                raise UserError(
                    f"run.dir={plan.run_dir} is not the same folder on all nodes: {', '.join(apart)} does not see what "
                    f"{nodes[0].name} writes there; a checkpoint is one folder into which every rank writes its part, "
                    "so run.dir must lie on a file system that all nodes share (NFS, Lustre, a mounted bucket). "
                    "The configuration needs none: it is brought to each node, and data.path may be local to each"
                )
        except UserError:
            nodes[0].tell("unmark_run", **run, made=made)
            raise
        nodes[0].tell("unmark_run", **run, made=[])
        for channel in nodes:
            gpus = self._gpus(channel)
            variables = plan.variables if gpus is None else {**plan.variables, visible.VARIABLE: gpus}
            job = {"cwd": str(plan.cwd), "words": plan.words, "environment": variables}
            files = {CONFIG_FILE: plan.config, "run_dir": str(plan.run_dir), JOB_FILE: json.dumps(job)}
            channel.tell("files", files=files)
        await_all(nodes, "files", CONNECT_SECONDS)
        return made

    def _gpus(self, channel: Channel) -> str | None:
        """CUDA_VISIBLE_DEVICES of a node's ranks; None: as deepspeed sets it."""
        shown = self.plan.visible if self.plan.visible is not None else channel.facts["visible"]
        return visible.gpus_of(self.plan.hosts[channel.node].slots, shown, f"{channel.name}: ")

    def _ask(self, channels: list[Channel], action: str, answer: str, **facts: object) -> None:
        for channel in channels:
            channel.tell(action, **facts)
        await_all(channels, answer, CONNECT_SECONDS)

    def _nodes(self) -> list[Channel]:
        return [channel for channel in self.channels if channel.node >= 0]

    def _compare(self) -> None:
        """Refuses nodes that would not compute the same."""
        ours = code_hashes(), versions()
        for channel in self._nodes():
            if problem := channel.facts["problem"]:
                raise UserError(
                    f"{channel.name} {problem}, where the job was started; start it in a folder that all nodes have"
                )
            if what := difference(ours[1], channel.facts["versions"]):
                raise UserError(f"{channel.name} has other versions than this machine: {what}; install the same on all")
            if what := difference(ours[0], channel.facts["code"]):
                raise UserError(
                    f"{channel.name} has other code of repa_scale than this machine: {what}; "
                    "install the same version on all nodes"
                )
            self._gpus(channel)

    def _sees_run(self) -> bool:
        return (self.plan.run_dir / "log").is_dir()

    def _start(self, folder: Path) -> subprocess.Popen:
        """deepspeed itself, with an environment in which there is nothing for it to export but the job's id."""
        address, port = self.plan.master
        first = self._nodes()[0].facts
        if self.plan.ssh:
            address, port = address or first["address"], port or first["port"]
        elif not self.plan.no_ssh:
            address, port = "127.0.0.1", port or first["port"]
        (folder / "hosts").write_text(as_hostfile(self.plan.hosts))
        environment = {**plain(os.environ), JOB: self.id, "DS_ENV_FILE": str(folder / "environment")}
        exported = {JOB: self.id}
        for name in ("DS_ACCELERATOR", "LD_LIBRARY_PATH", "PYTHONPATH"):  # what launch.py itself needs
            if value := self.plan.variables.get(name):
                if not SAFE.fullmatch(value) and self.plan.ssh:
                    raise UserError(
                        f"{name}={value!r} holds characters that a shell or pdsh would change on the way to the nodes; "
                        "leave it out here and set it on the nodes (in ~/.bashrc or ~/.ssh/environment)"
                    )
                environment[name] = value
                if name != "PYTHONPATH":  # deepspeed exports it by itself
                    exported[name] = value
        (folder / "environment").write_text("".join(f"{name}={value}\n" for name, value in exported.items()))
        words = deepspeed_words(self.plan, str(folder / "hosts"), address, port, self.id)
        process = start_deaf(
            words,
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._copy_output, args=(process,), daemon=True).start()
        return process

    # While it runs.

    def _watch(self, process: subprocess.Popen) -> None:
        """Until all ranks have ended, or something went wrong and all that is left was ended."""
        ranks = {rank for node in self.plan.nodes() for rank in self.plan.ranks_of(node)}
        began, pinged, passed_on, stop_by, end_by, hurried = time.monotonic(), 0.0, 0, 0.0, 0.0, False
        while ranks - self.ended.keys():
            now = time.monotonic()
            if now - pinged > PING_SECONDS:
                pinged = now
                for channel in self.channels:
                    channel.tell("ping")
            with suppress(queue.Empty):
                self._take(*self.inbox.get(timeout=0.1))
            for number in self._signals[passed_on:]:
                passed_on += 1
                if passed_on > 1 and number == signal.SIGINT:
                    self._fail("interrupted a second time")
                    break
                stop_by = stop_by or now + self.plan.grace_seconds + 30.0
                say(f"{signal.Signals(number).name}: all ranks are asked to save and end")
                for channel in self._nodes():
                    channel.tell("signal", number=int(signal.SIGTERM))
            for channel in self.channels:
                if not channel.gone and now - channel.heard > self.plan.lost_after:
                    self._fail(f"{channel.name} is lost: nothing was heard of it for {self.plan.lost_after:.0f} s")
                    channel.gone = True
            if stop_by and now > stop_by:
                self._fail("the ranks did not save within health.grace_seconds")
            if now - began > START_SECONDS and (late := ranks - self.started):
                names = ", ".join(sorted({self.plan.host_of(rank) for rank in late}))
                self._fail(f"{len(late)} ranks on {names} did not start in {START_SECONDS:.0f} s")
            if process.poll() is not None and not end_by:
                end_by = now + FOLLOW_SECONDS  # the last words of the guards may still be on their way
                if process.returncode < 0:
                    self._fail(f"deepspeed was killed by {signal.Signals(-process.returncode).name}")
            if self.ended and not end_by:
                end_by = now + LEAVE_SECONDS
            if self.problem and self.ended and not hurried:
                end_by, hurried = min(end_by, now + FOLLOW_SECONDS), True
            if self.problem and not self.ended:
                return
            if end_by and now > end_by:
                left = sorted(ranks - self.ended.keys())
                where = f"rank {left[0]} on {self.plan.host_of(left[0])}"
                if self.ended:
                    self._fail(f"{where} did not end with the others")
                else:
                    self._fail(f"deepspeed ended with code {process.returncode} before {where}; see its last lines")
                return
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAUNCHER_SECONDS)

    def _take(self, channel: Channel, event: dict) -> None:
        kind = event["event"]
        if kind == "started":
            self.started.add(event["rank"])
        elif kind == "gone" and channel.node >= 0:
            self._fail(f"the connection to the guard on {channel.name} is gone ({channel.complaint()})")
        elif kind == "ended":
            if event["error"].startswith(LOST) and not event.get("late"):  # the lost rank's own end is the cause
                late = (channel, {**event, "late": True})
                threading.Timer(CAUSE_SECONDS, self.inbox.put, [late]).start()
                return
            rank = event["rank"]
            self.ended[rank] = event
            if event["code"] not in WELL:
                where = f"rank {rank} on {self.plan.host_of(rank)}"
                self.error = self.error or event["error"]
                self._fail(f"{where} {event['what']}" + (f": {event['error']}" if event["error"] else ""))

    def _fail(self, what: str) -> None:
        if not self.problem:
            self.problem = what
            say(what)

    def _copy_output(self, process: subprocess.Popen) -> None:
        """One log of all ranks, on stdout and in RUN/log/launch.log; what the launchers say only in the file."""
        masked = secrets(self.plan.variables)
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            for value in masked:
                line = line.replace(value, "***")
            found = LINE.fullmatch(line)
            if found:
                host = found[1] or self.plan.host_of(int(found[2]))
                line = f"[{host} {found[2]}] {found[3]}"
                with suppress(OSError):
                    print(line, flush=True)
            if self._log is not None:
                with suppress(OSError, ValueError):
                    self._log.write(line + "\n")
                    self._log.flush()

    # At the end.

    def _verdict(self) -> int:
        """The run's own code, from the codes of its ranks."""
        codes = [how["code"] for how in self.ended.values()]
        for code in (ExitCode.BAD_INPUT, ExitCode.DIVERGED):
            if code in codes:
                return code
        if self.problem or not codes:
            return ExitCode.FAILED
        return max(codes)

    def _close(self, process: subprocess.Popen | None) -> None:
        """Ends everything of the job, everywhere."""
        for channel in self.channels:
            channel.tell("end")
        threads = [threading.Thread(target=channel.close) for channel in self.channels]
        for thread in threads:
            thread.start()
        said = False
        for thread in threads:
            while thread.is_alive():
                if (left := self._left()) and not said:
                    said = True
                    say(f"waits up to {STUCK_SECONDS:.0f} s for what was killed and has not ended: {', '.join(left)}")
                thread.join(0.2)
        self.left = self._left()
        if self.left:
            say(f"not ended: {', '.join(self.left)}; a driver holds it, and the memory of its GPU: {REMEDY}")
        if process is not None and process.poll() is None:
            process.kill()
        if process is not None:
            process.wait()
        if self._log is not None:
            self._log.close()

    def _left(self) -> list[str]:
        return [f"{process} on {channel.name}" for channel in self.channels for process in channel.left]


def deepspeed_words(plan: Plan, hostfile: str, address: str, port: int, job: str) -> list[str]:
    """deepspeed's command line. Nothing that a user typed, and no variable, is on it."""
    words = [str(Path(sys.executable).with_name("deepspeed"))]
    words += ["--hostfile", hostfile, "--include", as_include(plan.hosts)]
    if plan.ssh:
        words += ["--force_multi"]  # one node alone it would take for this machine
    if plan.no_ssh:
        words += ["--no_ssh", "--node_rank", str(plan.node_rank)]
    words += ["--no_ssh_check", "--master_addr", address, "--master_port", str(port)]
    return [*words, "--no_local_rank", "--module", "repa_scale.launch.rank", job]


def say(text: str) -> None:
    print(f"repa-scale launch: {text}", file=sys.stderr, flush=True)
