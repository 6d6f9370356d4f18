"""Supervision, and one writer a run folder: real launchers, real kills, two nodes in namespaces of their own."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import BIN, SMALL, Launch, end_all, exact, free_port, last_step, train

from repa_scale.errors import OUTCOME_VARIABLE
from repa_scale.processes import end_all_marked
from repa_scale.run_folder import read_incidents, read_status
from repa_scale.supervise import MARK, Supervisor

pytestmark = [pytest.mark.faults, pytest.mark.distributed]


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    end_all()


@pytest.fixture(scope="module")
def words(digits):
    return [*SMALL, f"data.path={digits}", "train.checkpoint_every=4", "method=baseline"]


class Supervised:
    """`repa-scale supervise` around a launcher; with faults, if there are any."""

    def __init__(self, words, run, *options, faults=(), processes=1, once=None):
        self.run = run
        module = "faults.worker" if faults else "repa_scale.train"
        command = [sys.executable, "-m", module]
        if processes > 1:
            command = [BIN / "torchrun", "--nproc-per-node", processes, "--master-port", free_port(), "-m", module]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "FAULTS": json.dumps(faults),
            "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        }
        if once:
            environment["FAULTS_ONCE"] = str(once)
        self.output = run.with_name("supervise.txt")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "repa_scale", "supervise", "--pause", "0.1", *options, "--"]
            + [str(word) for word in (*command, *words, f"run.dir={run}")],
            env=environment,
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait(self, patience=240):
        try:
            return self.process.wait(patience)
        finally:
            self.end()

    def end(self):
        if self.process.poll() is None:
            for mark in self.marks():
                end_all_marked(MARK, mark)
            self.process.kill()
            self.process.wait()

    def marks(self):
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"run.dir={self.run}".encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                    entries = (folder / "environ").read_bytes().split(b"\0")
                    found |= {e.decode().partition("=")[2] for e in entries if e.startswith(f"{MARK}=".encode())}
            except OSError:
                continue
        return found

    def text(self):
        return self.output.read_text()


@pytest.mark.long
def test_a_crash_at_the_same_step_each_time_is_given_up(words, tmp_path):
    """Once there is progress (a checkpoint), then none: two failures more and it ends, with the reason."""
    run = tmp_path / "run"
    supervised = Supervised(words, run, "--failures", "2", faults=[["crash", 0, 6]])
    assert supervised.wait() == 70, supervised.text()
    assert read_status(run)["state"] == "failed" and read_status(run)["attempt"] == 3
    incidents = read_incidents(run)
    assert [i["kind"] for i in incidents] == ["restart", "restart", "gave_up"]
    assert all("laid by the test" in i["reason"] and i["checkpoint_step"] == 4 for i in incidents)
    assert "giving up" in supervised.text()


def test_a_run_that_crashed_once_is_completed(words, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "once").mkdir()
    supervised = Supervised(words, run, faults=[["crash", 0, 6]], once=tmp_path / "once")
    assert supervised.wait() == 0, supervised.text()
    status = read_status(run)
    assert (status["state"], status["step"], status["attempt"]) == ("completed", 12, 2)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    # Steps 5 is trained twice; the time between the two starts is not productive.
    assert last["lost_repeated_seconds"] > 0 and last["lost_startup_seconds"] > 2 * 1.0
    assert 0 < last["goodput"] < 1
    assert last["productive_seconds"] == pytest.approx(
        last["goodput"] * sum(v for k, v in last.items() if k.startswith("lost_") or k == "productive_seconds")
    )


@pytest.mark.parametrize("launcher", [pytest.param("alone", marks=pytest.mark.long), "torchrun"])
def test_wrong_input_is_not_tried_again(words, tmp_path, launcher):
    """Torchrun makes 1 of every code; it is seen all the same."""
    supervised = Supervised([*words, "train.precision=fp8"], tmp_path / "run", processes=1 + (launcher == "torchrun"))
    code = supervised.wait()
    assert code == 64, supervised.text()

    assert "starting again would not help" in supervised.text()


def test_a_command_that_only_says_success_is_not_believed(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "repa_scale", "supervise", "--failures", "1", "--run", str(run), "--", "true"]
    assert subprocess.run(command, capture_output=True).returncode == 70


@pytest.mark.long
def test_an_outcome_that_a_full_disk_cut_short_is_passed_over(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    cut = f"printf '{{' > ${OUTCOME_VARIABLE}/rank_0.json; : > ${OUTCOME_VARIABLE}/rank_1.json; exit 70"
    whole = f'printf \'{{"code": 64, "error": "rank 2 says why"}}\' > ${OUTCOME_VARIABLE}/rank_2.json'
    assert Supervisor(["sh", "-c", cut], tmp_path, failures=1, pause=0.1).run() == 70
    assert Supervisor(["sh", "-c", f"{whole}; {cut}"], tmp_path, failures=1, pause=0.1).run() == 64
    assert "rank 2 says why" in capsys.readouterr().err


def test_sigterm_to_the_supervisor_saves_the_run(words, tmp_path):
    run = tmp_path / "run"
    supervised = Supervised([*words, "train.steps=100000"], run)
    try:
        until = time.monotonic() + 120
        while last_step(run) < 3:
            assert time.monotonic() < until and supervised.process.poll() is None, supervised.text()
            time.sleep(0.05)
        supervised.process.send_signal(signal.SIGTERM)
        assert supervised.wait() == 75
        assert read_status(run)["state"] == "preempted"
    finally:
        supervised.end()


@pytest.mark.long
@pytest.mark.timeout(1800)  # 6 minutes on two idle cores
def test_twenty_random_kills(words, tmp_path):
    """Random ranks at random moments of one run of 200 steps; the curve is the undisturbed one's."""
    words = [*words, "train.steps=200", "train.checkpoint_every=5", "checkpoint.keep_last=3"]
    wanted = train(words, tmp_path / "undisturbed")
    run = tmp_path / "run"
    supervised = Supervised(words, run, "--failures", "12", processes=2)
    moments = random.Random(7)
    kills = 0
    probe = Launch.__new__(Launch)
    probe.run = run
    try:
        while supervised.process.poll() is None and kills < 20:
            ranks = probe.ranks()
            if len(ranks) < 2 or last_step(run) >= 195:
                time.sleep(0.1)
                continue
            # By turns some steps into a start, and at any moment of it, from the first import on.
            far, before = moments.randint(1, 14), last_step(run)
            until = time.monotonic() + (120.0 if kills % 2 == 0 else moments.uniform(0.0, 10.0))
            while time.monotonic() < until and last_step(run) < before + far and supervised.process.poll() is None:
                time.sleep(0.02)
            victims = probe.ranks()
            if victims:
                os.kill(moments.choice(victims), signal.SIGKILL)
                kills += 1
            while probe.ranks() == victims and supervised.process.poll() is None:
                time.sleep(0.1)
        assert supervised.wait(600) == 0, supervised.text()
    finally:
        supervised.end()
    assert kills == 20
    from repa_scale.run_folder import read_metrics

    assert exact(read_metrics(run)) == exact(wanted)
    assert read_status(run)["attempt"] > 5


def in_a_node(name, words, run):
    """A start in pid and host-name namespaces of its own, as on another node that shares the folder."""
    inner = f"hostname {name}; exec {sys.executable} -m repa_scale.train " + " ".join([*words, f"run.dir={run}"])
    return subprocess.Popen(
        ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", inner],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def namespaces():
    if subprocess.run(["unshare", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True).returncode:
        pytest.skip("namespaces need root")


@pytest.mark.long
def test_two_nodes_start_on_one_folder(words, tmp_path, namespaces):
    """Process ids of another node mean nothing here, and its clock may be an hour off: the heartbeat decides."""
    run = tmp_path / "run"
    first = in_a_node("node-a", [*words, "train.steps=100000"], run)
    second = None
    try:
        until = time.monotonic() + 120
        while last_step(run) < 2:
            assert time.monotonic() < until and first.poll() is None
            time.sleep(0.1)
        lease = json.loads((run / "lease.json").read_text())
        assert lease["host"] == "node-a"
        second = in_a_node("node-b", words, run)
        _, error = second.communicate(timeout=120)
        assert second.returncode == 64 and "is in use: process" in error and "node-a" in error
        assert first.poll() is None
        first.kill()
        first.wait()
        # Its clock was ahead: the age of the last heartbeat says nothing, that none comes does.
        lease = json.loads((run / "lease.json").read_text())
        (run / "lease.json").write_text(json.dumps({**lease, "updated": time.time() + 3600}))
        third = in_a_node("node-b", [*words, f"train.steps={last_step(run) + 1}"], run)
        second = third
        _, error = third.communicate(timeout=180)
        assert third.returncode == 0, error
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


@pytest.mark.long
def test_two_starts_at_once_on_one_machine(words, tmp_path):
    run = tmp_path / "run"
    starts = [Launch([*words, "train.steps=40"], run, 1, "alone") for _ in range(2)]
    codes = sorted(start.process.wait(180) for start in starts)
    assert codes == [0, 64], [start.text() for start in starts]
    refused = next(start for start in starts if start.process.returncode == 64)
    assert "in use" in refused.text() or "at the same moment" in refused.text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))


@pytest.mark.long
def test_a_holder_taken_for_dead_stops_writing(tmp_path):
    """It slept while another took the folder: it must notice before it writes."""
    from repa_scale import run_folder

    identity = {"keys": {}, "identity_hash": "a", "pair_id": "b"}
    run = run_folder.open_run(tmp_path / "run", identity, "", "auto")
    run.start()
    taken = {**json.loads((tmp_path / "run" / "lease.json").read_text()), "token": "another", "host": "node-b"}
    (tmp_path / "run" / "lease.json").write_text(json.dumps(taken))
    until = time.monotonic() + 2 * run_folder.HEARTBEAT_SECONDS
    with pytest.raises(RuntimeError, match=r"taken over by process .* on node-b"):
        while time.monotonic() < until:
            run.progress(3)
            time.sleep(0.1)
    before = (tmp_path / "run" / "status.json").read_text()
    run.fail("late")
    assert (tmp_path / "run" / "status.json").read_text() == before
    assert json.loads((tmp_path / "run" / "lease.json").read_text())["token"] == "another"
