"""Faults in steps: gradients that are not finite, poisoned batches, hangs, slow ranks, stop signals, clock jumps."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import SMALL, Launch, end_all, exact, train

from repa_scale.checkpoint import list_checkpoints
from repa_scale.config import HealthConfig
from repa_scale.data.batches import open_dataset
from repa_scale.data.order import Order
from repa_scale.divergence import NEEDED, Judge
from repa_scale.errors import ConfigError
from repa_scale.run_folder import read_incidents, read_metrics, read_status
from repa_scale.windows import Window, batch_number, parse_windows

pytestmark = [pytest.mark.faults]


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    end_all()


@pytest.fixture(scope="module")
def words(digits):
    return [*SMALL, f"data.path={digits}", "train.checkpoint_every=4", "method=baseline"]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    return run, train(words, run)


def faulty(words, run, *faults, **environment):
    return Launch(words, run, FAULTS=json.dumps(faults), **environment)


def of_kind(run, kind):
    return [incident for incident in read_incidents(run) if incident["kind"] == kind]


def test_windows():
    assert parse_windows("3-5, 9") == [(3, 5), (9, 9)] and parse_windows("") == []
    for wrong in ("5-3", "x", "0", "1-2-3"):
        with pytest.raises(ConfigError, match=r"health\.leave_out"):
            parse_windows(wrong)
    left = [(9, 9), (3, 5), (4, 6)]
    assert [batch_number(step, left) for step in range(6)] == [0, 1, 2, 7, 8, 10]


def test_the_judge():
    judge = Judge(HealthConfig(max_skips=2, on_spike="rollback", spike_deviations=10.0), "fp32")
    for step in range(1, NEEDED + 1):
        assert judge.judge(step, step, 100.0 if step == 3 else 1.0 + 0.01 * (step % 5), 2.0, True) == ("", None)
    assert judge.judge(20, 20, 1.04, 2.0, True) == ("", None)
    assert judge.judge(21, 21, 10.0, 2.0, True) == ("spike", Window(21, 21, 21))
    assert judge.judge(21, 22, 1.0, 20.0, True) == ("spike", Window(22, 22, 21))
    assert not judge.is_spike("loss", 0.1), "less is no spike"
    again = Judge(judge.settings, "fp32")
    again.set_state(json.loads(json.dumps(judge.state())))
    for each in (judge, again):
        inf = float("inf")
        assert [each.judge(30 + i, 40 + i, 1.0, inf, False) for i in range(3)] == [
            ("not_finite", None),
            ("not_finite", None),
            ("not_finite", Window(40, 42, 30)),
        ]
    loss_scale_search = Judge(judge.settings, "fp16")
    assert all(loss_scale_search.judge(i, i, 1.0, float("inf"), False)[1] is None for i in range(1, 10))


@pytest.mark.distributed
def test_nan_on_one_rank_once(words, undisturbed, digits, tmp_path):
    """The step is left out on all ranks, EMA untouched, counted and logged with the ids of its samples."""
    run = tmp_path / "run"
    rows = faulty([*words, "train.checkpoint_every=1"], run, ["nan", 1, 5, 5]).succeed()
    assert exact(rows)[:4] == exact(undisturbed[1])[:4]
    assert [row["skipped_steps"] for row in rows] == [0] * 4 + [1] * 8 and rows[4]["grad_norm"] == "inf"
    (incident,) = of_kind(run, "not_finite")
    dataset = open_dataset(str(digits))
    import torch

    order = Order([shard.samples for shard in dataset.reader.shards], 0, dataset.fingerprint)
    numbers = order.at(torch.arange(32, 40)).tolist()
    assert (incident["step"], incident["batch"]) == (5, 5)
    assert incident["sample_ids"] == [dataset.reader[number]["id"] for number in numbers]
    from test_faults_checkpoints import tensors

    before, after = (tensors(run / "checkpoints" / f"step_{step:08d}") for step in (4, 5))
    assert all(torch.equal(before[key], after[key]) for key in before), "weights, moments and EMA to the bit"
    left = tensors(run / "checkpoints" / "step_00000006")
    assert not all(torch.equal(before[key], left[key]) for key in before)


@pytest.mark.long
@pytest.mark.distributed
def test_nan_for_many_steps_rolls_back_and_leaves_the_window_out(words, tmp_path):
    """The run equals one that was told to leave the same batches out."""
    run = tmp_path / "run"
    health = ["health.max_skips=1", "health.max_rollbacks=1"]
    rows = faulty([*words, *health], run, ["nan", 0, 7, 8]).succeed()
    (incident,) = of_kind(run, "rollback")
    assert (incident["step"], incident["to_step"], incident["left_out"]) == (7, 4, [7, 8])
    assert [row["attempt"] for row in rows] == [1] * 4 + [2] * 8
    told = train([*words, "health.leave_out=7-8"], tmp_path / "told")
    assert exact(rows) == exact(told)
    # A later start still leaves them out.
    more = [*words, *health, "train.steps=14"]
    assert exact(train(more, run))[12:] == exact(train([*more, "health.leave_out=7-8"], tmp_path / "told"))[12:]


@pytest.mark.distributed
def test_too_many_rollbacks_are_divergence(words, tmp_path):
    run = tmp_path / "run"
    launch = Launch(
        [*words, "health.max_skips=0", "health.max_rollbacks=2"],
        run,
        1,
        "alone",
        FAULTS=json.dumps([["nan", 0, 3, 99]]),
    )
    assert launch.wait() == 65
    assert read_status(run)["state"] == "diverged" and len(of_kind(run, "rollback")) == 2
    assert [i["to_step"] for i in of_kind(run, "rollback")] == [0, 0], "there was no checkpoint yet"


@pytest.mark.distributed
@pytest.mark.parametrize(
    "policy", [pytest.param("log", marks=pytest.mark.long), "skip", pytest.param("rollback", marks=pytest.mark.long)]
)
def test_a_poisoned_batch(words, tmp_path, policy):
    """Its loss is ten times the usual."""
    steps = ["train.steps=26", "train.checkpoint_every=10", f"health.on_spike={policy}"]
    run = tmp_path / "run"
    launch = Launch([*words, *steps], run, 1, "alone", FAULTS=json.dumps([["poison", 0, 22]]))
    rows = launch.succeed()
    spike = of_kind(run, "spike")[0]
    assert (spike["batch"], len(spike["sample_ids"])) == (22, 8)
    told = [*words, *steps, "health.leave_out=22"]
    if policy == "log":
        assert rows[21]["loss"] == spike["loss"] and not rows[-1]["skipped_steps"]
    elif policy == "skip":
        assert not spike["applied"] and rows[-1]["skipped_steps"] == 1
        assert all(row["loss"] < 0.5 * spike["loss"] for row in rows if row["step"] != 22)
    else:
        assert exact(rows) == exact(train(told, tmp_path / "told", 1, "alone"))


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs(words, tmp_path, rank):
    run = tmp_path / "run"
    launch = faulty([*words, "health.hang_seconds=3", "train.checkpoint_every=2"], run, ["stop_self", rank, 6])
    other = 1 - rank
    until = time.monotonic() + 120
    while read_status(run).get("state") != "failed" and launch.process.poll() is None:
        assert time.monotonic() < until, launch.text()
        time.sleep(0.1)
    status = read_status(run)
    assert status["state"] == "failed" and f"watchdog: rank {other} on" in status["reason"], status
    assert f"rank {rank} does not answer" in status["reason"] and " of step " in status["reason"]
    log = (run / "log" / f"rank_{other}.log").read_text()
    assert "Python stacks of all threads" in log and "train_from" in log
    launch.kill()
    rows = train(words, run)
    assert [row["step"] for row in rows] == list(range(1, 13))


@pytest.mark.distributed
def test_a_hang_alone_ends_with_70(words, tmp_path):
    """The code of the process, and the stacks that name the line."""
    run = tmp_path / "run"
    faults = json.dumps([["slow_data", 0, 8, 600], ["impatient", 0]])
    launch = Launch([*words, "health.hang_seconds=2"], run, 1, "alone", FAULTS=faults)
    assert launch.wait() == 70
    status = read_status(run)
    trace = Path(status["flight_recorder"])
    assert trace.parent == run / "log" and pickle.loads(trace.read_bytes())["entries"], "the last collectives"
    assert status["state"] == "failed" and "hung in data of step 8" in status["reason"]
    assert "next_batch" in (log := (run / "log" / "rank_0.log").read_text()) or "batches.py" in log


LOOKS_INTO_THE_STORE = """
import atexit, sys, threading, torch
from pathlib import Path
from repa_scale import processes, watchdog
from repa_scale.config import HealthConfig
from repa_scale.ranks import Ranks
watchdog.POLL_SECONDS = 0.0
ranks = Ranks(0, 0, 1, torch.device("cpu"))
ranks.start()
"""
ITS_WATCHDOG = "watchdog.Watchdog(ranks, Path(sys.argv[1]), None, HealthConfig(), lambda: 0.0)"
ANY_THREAD = """
store = ranks.store()
def look():
    while True:
        store.check(["key"])
threading.Thread(target=look, daemon=True).start()
atexit.register(print, "exit handlers ran")
print("output")
processes.end_process(75)
"""


@pytest.mark.parametrize(
    ("thread", "code", "said"), [(ITS_WATCHDOG, 0, ""), (ANY_THREAD, 75, "output\nexit handlers ran\n")]
)
def test_a_process_ends_whole_while_a_thread_looks_into_the_store(tmp_path, thread, code, said):
    """A thread that the interpreter's end cuts off in torch's C++ aborts the process, even of a completed run."""
    script = LOOKS_INTO_THE_STORE + thread
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, said), done.stderr


@pytest.mark.long
@pytest.mark.distributed
def test_a_slow_rank_is_named(words, tmp_path):
    run = tmp_path / "run"
    rows = faulty([*words, "train.log_every=4"], run, ["slow_rank", 1, 0.3]).succeed()
    for row in rows:
        assert (row["straggler_rank"], row["straggler_phase"]) == (1, "latent")
        assert row["straggler_seconds"] > 0.2
    assert "rank 1 on" in (run / "log" / "rank_0.log").read_text()


STOPS = {
    "in a data wait": (["slow_data", 1, 6, 4], [], 6),
    "in an asynchronous save": (["slow_write", "all", 3], ["train.checkpoint_every=3"], None),
    "in sampling": (["slow_sampling", "all", 2], ["train.sample_every=5", "sample.count=8", "sample.batch=1"], 5),
}


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.parametrize("where", list(STOPS))
def test_sigterm_to_one_rank(words, undisturbed, tmp_path, where):
    fault, changes, step = STOPS[where]
    run = tmp_path / "run"
    launch = faulty([*words, "train.steps=100000", "train.checkpoint_every=1000", *changes], run, fault)
    launch.wait_for_step(5 if step else 4)
    time.sleep(0.5)
    os.kill(launch.ranks()[1], signal.SIGTERM)
    began = time.monotonic()
    launch.wait()
    assert time.monotonic() - began < 30
    status = read_status(run)
    assert status["state"] == "preempted" and status["step"] == (step or status["step"])
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{status['step']:08d}"
    if where == "in sampling":
        assert not list((run / "samples").iterdir()), "the grid was left for the save"
    rows = train([*words, f"train.steps={status['step'] + 2}"], run)
    same = min(len(rows), 12)
    assert exact(rows)[:same] == exact(undisturbed[1])[:same]


@pytest.mark.distributed
@pytest.mark.long
def test_a_save_longer_than_the_grace_ends_with_70(words, tmp_path):
    """Whoever asked will kill it soon: the log says why there is no new checkpoint, and the one before counts."""
    run = tmp_path / "run"
    words = [*words, "train.steps=100000", "train.checkpoint_every=100000"]
    faults = json.dumps([["slow_write", 0, 120]])
    launch = Launch([*words, "health.grace_seconds=2"], run, 1, "alone", FAULTS=faults)
    launch.wait_for_step(3)
    os.kill(launch.process.pid, signal.SIGTERM)
    assert launch.wait(60) == 70
    status = read_status(run)
    assert status["state"] == "failed" and "has not saved within health.grace_seconds=2" in status["reason"]
    assert " save of step " in status["reason"] and not list_checkpoints(run / "checkpoints")


@pytest.mark.distributed
@pytest.mark.long
def test_ctrl_c_saves_and_twice_quits(words, tmp_path):
    run = tmp_path / "run"
    words = [*words, "train.steps=100000", "train.checkpoint_every=100000"]
    launch = Launch(words, run, 1, "alone")
    launch.wait_for_step(2)
    os.kill(launch.process.pid, signal.SIGINT)
    assert launch.wait(60) == 75 and read_status(run)["state"] == "preempted"
    saved = [path.name for path in list_checkpoints(run / "checkpoints")]
    again = Launch(words, run, 1, "alone", FAULTS=json.dumps([["slow_write", 0, 120]]))
    again.wait_for_step(read_status(run)["step"] + 2)
    for _ in range(2):
        os.kill(again.process.pid, signal.SIGINT)
        time.sleep(1)
    assert again.wait(8) == 130 and "Traceback" not in again.text()
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == saved


@pytest.mark.distributed
@pytest.mark.long
def test_the_signal_of_slurm_saves(words, tmp_path):
    launch = Launch([*words, "train.steps=100000"], tmp_path / "run", 1, "alone")
    launch.wait_for_step(2)
    os.kill(launch.process.pid, signal.SIGUSR1)
    assert launch.wait(60) == 75 and read_status(tmp_path / "run")["state"] == "preempted"


@pytest.mark.distributed
@pytest.mark.long
def test_the_clock_jumps_by_an_hour(words, undisturbed, tmp_path):
    run = tmp_path / "run"
    rows = faulty([*words, "health.hang_seconds=20"], run, ["jump_clock", "all", 5]).succeed()
    assert exact(rows) == exact(undisturbed[1])
    last = rows[-1]
    assert sum(v for k, v in last.items() if k.startswith("lost_") or k == "productive_seconds") < 600


@pytest.mark.distributed
@pytest.mark.long
def test_a_kill_with_prefetching_workers_uses_each_sample_once(words, tmp_path):
    words = [*words, "data.workers=2"]
    wanted = train(words, tmp_path / "undisturbed")
    run = tmp_path / "run"
    first = Launch(words, run)
    first.wait_for_step(6)
    first.kill()
    rows = train(words, run)
    assert exact(rows) == exact(wanted)
    assert [r["batch_fingerprint"] for r in read_metrics(run)] == [r["batch_fingerprint"] for r in wanted]
