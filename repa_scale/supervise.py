"""`repa-scale supervise -- COMMAND`: starts a training command again until its run is done; knows when to give up.

What the run came to is read from its status.json, and from the file that each rank leaves on its way out
(`OUTCOME_VARIABLE`): launchers return 0 for a killed child and 1 for every other code.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from repa_scale.errors import OUTCOME_VARIABLE, ExitCode, UserError
from repa_scale.processes import REMEDY, Process, end_all_marked, marked

EXAMPLE = (
    "repa-scale supervise -- deepspeed --num_gpus 8 --module repa_scale.train experiment=repa_sit_xl run.dir=runs/xl"
)
MARK = (
    "REPA_SCALE_SUPERVISED"  # in the environment of all that a start has started, so that nothing of it is left behind
)
LONGEST_PAUSE = 300.0  # seconds
LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Ended:
    """How a start came to its end.

    Attributes:
        state: of status.json; `killed` where it still says running.
        code: the highest that a rank left, or the command's own.
        progress: the newest checkpoint's step.
        left: processes that outlived their SIGKILL: of this machine, or by name of another.
    """

    state: str
    code: int
    reason: str
    progress: int
    left: tuple[Process | str, ...] = ()


def main(argv: list[str]) -> int:
    """Returns 0 when the run is completed, 64, 65 or 75 as the run says, and 70 when it is given up."""
    if "--" in argv:
        at = argv.index("--")
        argv, command = argv[:at], argv[at + 1 :]
    else:
        command = []
    parser = argparse.ArgumentParser(
        prog="repa-scale supervise", description=__doc__.split(": ", 1)[1].split("\n")[0], epilog=f"example: {EXAMPLE}"
    )
    parser.add_argument(
        "--failures", type=int, default=3, metavar="N", help="give up after N in a row without progress (3)"
    )
    parser.add_argument(
        "--pause", type=float, default=2.0, metavar="S", help="seconds before a new start, doubled each (2)"
    )
    parser.add_argument("--run", type=Path, help="the run folder; needed where COMMAND has no run.dir=")
    args = parser.parse_args(argv)
    if not command:
        raise UserError(f"supervise needs a command behind --; for example: {EXAMPLE}")
    named = [word.removeprefix("run.dir=") for word in command if word.startswith("run.dir=")]
    if args.run is None and not named:
        raise UserError("supervise does not know the run folder; give run.dir=RUN in the command, or --run RUN")
    return Supervisor(command, args.run or Path(named[-1]), args.failures, args.pause).run()


class Supervisor:
    """Starts `command` again and again. SIGTERM and SIGINT create RUN/stop, which reaches ranks under any launcher."""

    def __init__(self, command: list[str], run: Path, failures: int, pause: float) -> None:
        self.command, self.folder, self.failures, self.pause = command, run, failures, pause
        self._stopping = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        starts, without_progress, pause = 0, 0, self.pause
        held: list[Process | str] = []  # of earlier starts, and what they hold is not free
        excused = 0  # starts that met such
        best, last = _newest_step(self.folder), None
        while True:
            starts += 1
            ended = self._start()
            if ended.state == "completed":
                _say(f"completed after {starts} start{'s' * (starts > 1)}")
                return ExitCode.COMPLETED
            if ended.code in (ExitCode.BAD_INPUT, ExitCode.DIVERGED) or ended.state == "diverged":
                code = ExitCode.DIVERGED if ended.state == "diverged" else ended.code
                self._note("gave_up", ended, starts, "starting again would not help")
                _say(f"code {int(code)}: {ended.reason or 'wrong input'}; starting again would not help")
                return code
            if ended.state == "preempted" or self._stopping:
                _say("preempted and saved; the same command goes on" if ended.state == "preempted" else "stopped")
                return ExitCode.PREEMPTED if ended.state == "preempted" else ExitCode.FAILED
            met = ", ".join(map(str, held)) if ended.progress <= best else ""
            if ended.progress > best:
                best, without_progress, excused, pause = ended.progress, 0, 0, self.pause
            elif met:
                excused += 1
            else:
                without_progress += 1
            if excused >= self.failures:
                self._note("gave_up", ended, starts, f"{excused} starts met what does not end: {met}")
                _say(f"giving up: {excused} starts met {met}, which SIGKILL does not end; {REMEDY}")
                return ExitCode.FAILED
            if without_progress >= self.failures:
                same = " with the same reason" if last and last.reason == ended.reason else ""
                self._note("gave_up", ended, starts, f"{without_progress} failures without progress")
                _say(
                    f"giving up: {without_progress} starts in a row failed{same} and none came behind step "
                    f"{best} ({ended.reason or ended.state}); see {self.folder / 'log'}"
                )
                return ExitCode.FAILED
            last = ended
            met = met and f"; not counted, as it met {met}"
            self._note("restart", ended, starts, f"waits {pause:g} s{met}")
            reason = ended.reason or f"code {ended.code}"
            _say(f"start {starts} ended: {ended.state}, {reason}{met}; again in {pause:g} s")
            held = self._awaited([*(p for p in held if isinstance(p, Process)), *ended.left], ended, starts)
            self._sleep(pause)
            if self._stopping:
                return ExitCode.FAILED
            pause = min(2 * pause, LONGEST_PAUSE)

    def _start(self) -> Ended:
        """One start of the command, until nothing of it is left."""
        mark = uuid.uuid4().hex
        before = _status(self.folder)
        with tempfile.TemporaryDirectory(prefix="repa-scale-") as outcomes:
            environment = {**os.environ, MARK: mark, OUTCOME_VARIABLE: outcomes}
            try:
                child = subprocess.Popen(self.command, env=environment, start_new_session=True)
            except OSError as error:
                raise UserError(f"{self.command[0]} cannot be started ({error.strerror}); is it on the PATH?") from None
            code, known = None, set()
            while code is None:
                try:
                    code = child.wait(LOOK_SECONDS)
                except subprocess.TimeoutExpired:
                    known.update(marked(MARK, mark))  # one that is ending is not found any more
            stuck = end_all_marked(MARK, mark, known, lambda left: _say(f"waits for {', '.join(map(str, left))}"))
            left = [json.loads(path.read_text()) for path in Path(outcomes).glob("rank_*.json")]
        status = _status(self.folder)
        state, reason = status.get("state", ""), status.get("reason", "")
        if status == before:  # this start did not come so far as to write it
            state, reason = "failed", ""
        elif state == "running":
            state, reason = "killed", "its processes were killed"
        bad = [each for each in left if each["code"] == ExitCode.BAD_INPUT]
        # Ranks that only lost their partner leave other codes than the one that found the reason.
        chosen = (bad or sorted(left, key=lambda each: -each["code"]) or [{"code": abs(code), "error": ""}])[0]
        elsewhere = [process for each in left for process in each.get("left", ())]
        return Ended(state, chosen["code"], reason or chosen["error"], _newest_step(self.folder), (*stuck, *elsewhere))

    def _awaited(self, left: list[Process | str], ended: Ended, starts: int) -> list[Process | str]:
        """Those of `left` that are still there after a while; what other machines hold cannot be seen from here."""
        if not left:
            return []
        names = ", ".join(map(str, left))
        self._note("processes_left", ended, starts, f"not ended by SIGKILL: {names}; waits {LONGEST_PAUSE:g} s")
        _say(f"not ended by SIGKILL: {names}; a driver holds it, and the memory of its GPU")
        until = time.monotonic() + LONGEST_PAUSE
        while left and time.monotonic() < until and not self._stopping:
            time.sleep(0.1)
            left = [process for process in left if isinstance(process, str) or process.there()]
        return left

    def _stop(self, *_: object) -> None:
        self._stopping = True
        with suppress(OSError):
            (self.folder / "stop").touch()

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stopping:
            time.sleep(0.1)

    def _note(self, kind: str, ended: Ended, starts: int, what: str) -> None:
        from repa_scale.run_folder import log_incident

        with suppress(OSError):
            log_incident(
                self.folder,
                kind,
                by="supervise",
                starts=starts,
                state=ended.state,
                code=ended.code,
                reason=ended.reason,
                checkpoint_step=ended.progress,
                what=what,
            )


def _status(run: Path) -> dict:
    from repa_scale.run_folder import read_status

    return read_status(run)


def _newest_step(run: Path) -> int:
    """Of the newest checkpoint, by name: whether it is whole is the next start's business. 0: there is none."""
    from repa_scale.checkpoint import list_checkpoints

    return max((int(path.name[5:]) for path in list_checkpoints(run / "checkpoints")), default=0)


def _say(text: str) -> None:
    print(f"repa-scale supervise: {text}", file=sys.stderr, flush=True)
