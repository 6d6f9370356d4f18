"""Processes that outlive their SIGKILL, as a driver makes them: waited for, named, and no fault of the next start."""

import json
import queue
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from repa_scale import processes, supervise
from repa_scale.launch import channel as channels
from repa_scale.launch import guard as guards
from repa_scale.processes import Process, alive, end_all_marked, marked, process_of
from repa_scale.run_folder import read_incidents
from repa_scale.supervise import Ended, Supervisor

STUCK = Process(4_000_001, 7, "python -u -m repa_scale.train")


class Clock:
    """Time that passes in `sleep` alone."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (processes, supervise):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def held(monkeypatch, clock):
    """A process that a driver holds until `held.until`; on its way out it has no environment any more."""
    state = SimpleNamespace(until=float("inf"), killed=[])
    found = iter([[STUCK]])
    monkeypatch.setattr(processes, "marked", lambda *_: next(found, []))
    monkeypatch.setattr(processes.os, "kill", lambda pid, number: state.killed.append((pid, number, clock.now)))
    monkeypatch.setattr(Process, "there", lambda process: clock.now < state.until)
    return state


def test_a_process_in_the_driver_is_waited_for(held, clock):
    held.until, told = 100.0, []
    assert end_all_marked("MARK", "value", tell=told.append) == []
    assert 100.0 <= clock.now < 101.0 and told == [[STUCK]]
    assert {(pid, number) for pid, number, _ in held.killed} == {(STUCK.pid, 9)}


def test_after_two_minutes_the_survivors_are_named(held, clock):
    (left,) = end_all_marked("MARK", "value")
    assert str(left) == "process 4000001 (python -u -m repa_scale.train)" and 120.0 <= clock.now < 121.0


def test_what_was_found_earlier_is_waited_for_too(held, clock, monkeypatch):
    monkeypatch.setattr(processes, "marked", lambda *_: [])
    held.until = 30.0
    assert end_all_marked("MARK", "value", {STUCK}) == [] and clock.now >= 30.0


def test_a_real_process_is_found_described_and_ended():
    words = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(words, env={"MARK": "mine"}, stdout=subprocess.PIPE) as child:
        child.stdout.read(1)
        (found,) = marked("MARK", "mine")
        assert found == process_of(child.pid) and "time.sleep(60)" in found.command and found.there()
        assert not Process(found.pid, found.began + 1, "another of this number").there()
        assert end_all_marked("MARK", "mine") == [] and not found.there()  # a zombie: nobody has waited for it
    assert child.returncode == -9 and process_of(child.pid) is None


def test_a_process_whose_first_thread_has_ended_is_alive():
    """As one is that was killed while a driver holds another of its threads."""
    program = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print(flush=True)\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        child.stdout.read(1)
        until = time.monotonic() + 10
        while processes._stat(str(child.pid))[0] != b"Z":
            assert time.monotonic() < until
            time.sleep(0.01)
        assert alive(child.pid)
        child.kill()
        child.wait()
        assert not alive(child.pid)


def test_the_guard_knows_its_ranks_and_tells_what_is_left(monkeypatch, tmp_path):
    guard, said = guards.Guard(), []
    guard.job, guard.folder, guard.slots = "job", tmp_path, 1
    (tmp_path / "rank_pid_0.json").write_text(json.dumps({"pid": processes.os.getpid()}))
    guard.say = lambda event, **facts: said.append((event, facts))
    guard._look()

    def end_all(variable, value, known, tell):
        assert [process.pid for process in known] == [processes.os.getpid()]
        tell([STUCK])
        return []

    monkeypatch.setattr(guards, "end_all_marked", end_all)
    guard._end_all()
    assert said[1:] == [("left", {"processes": [str(STUCK)]}), ("left", {"processes": []})]


GUARD = """
import json, sys, time
sys.stdin.read()
if {told}:
    print(json.dumps({{"event": "left", "processes": ["process 1 (train)"]}}), flush=True)
time.sleep(1.0)
"""


@pytest.mark.parametrize("told", [True, False])
def test_the_launcher_waits_for_a_guard_that_says_for_what(told, monkeypatch, tmp_path):
    monkeypatch.setattr(channels, "python_on", lambda *_: [sys.executable, "-c", GUARD.format(told=told)])
    monkeypatch.setattr(channels, "END_SECONDS", 0.6)
    channel = channels.Channel("", 0, queue.Queue())
    channel.close()
    assert channel.left == (["process 1 (train)"] if told else [])
    assert channel.process.returncode == (0 if told else -9)


def failing(monkeypatch, tmp_path, lefts, failures=2):
    """A supervisor whose starts fail without progress, each leaving processes behind."""
    supervisor = Supervisor(["train"], tmp_path, failures, 1.0)
    starts = iter(lefts)
    monkeypatch.setattr(supervisor, "_start", lambda: Ended("failed", 70, "out of memory", 0, next(starts)))
    monkeypatch.setattr(supervise.signal, "signal", lambda *_: None)
    return supervisor.run(), [(i["kind"], i["what"]) for i in read_incidents(tmp_path)]


def test_a_start_that_met_survivors_does_not_count(held, clock, monkeypatch, tmp_path, capsys):
    """The first fails and leaves one; the second meets it, until it ends; the third fails by itself."""
    held.until = 310.0
    code, incidents = failing(monkeypatch, tmp_path, [(STUCK,), (), ()])
    assert code == 70 and [kind for kind, _ in incidents] == [
        "restart", "processes_left", "restart", "processes_left", "gave_up",
    ]  # fmt: skip
    assert str(STUCK) in incidents[1][1] and "not counted, as it met process 4000001" in incidents[2][1]
    assert incidents[-1][1] == "2 failures without progress"
    assert "not ended by SIGKILL: process 4000001 (python" in capsys.readouterr().err


def test_a_supervisor_waits_and_goes_on_where_they_end(held, clock, monkeypatch, tmp_path):
    held.until = 60.0
    code, incidents = failing(monkeypatch, tmp_path, [(STUCK,), ()])
    assert code == 70 and incidents[-1] == ("gave_up", "2 failures without progress") and 60.0 <= clock.now < 70.0


def test_survivors_that_never_end_are_a_clear_line(held, clock, monkeypatch, tmp_path, capsys):
    code, incidents = failing(monkeypatch, tmp_path, [(f"{STUCK} on rs-b",)] * 3)
    assert code == 70 and "2 starts met what does not end: process 4000001" in incidents[-1][1]
    assert "on rs-b, which SIGKILL does not end; reboot its node" in capsys.readouterr().err
