"""Who waits inside gives up first: loader, save and upload before the watchdog, the watchdog before the collective."""

import ast
import json
import pickle
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

import repa_scale
from repa_scale import flight_recorder, timeouts, tracking, watchdog
from repa_scale.config import HealthConfig
from repa_scale.data import batches, fetcher, remote
from repa_scale.errors import LOST
from repa_scale.launch import job
from repa_scale.ranks import Ranks
from repa_scale.watchdog import Watchdog

SETTINGS = HealthConfig()


def test_the_order_of_all_waits():
    assert timeouts.FIRST < timeouts.SAVER < timeouts.LONGEST < timeouts.collectives() < timeouts.HOST
    wrapped = {
        "data": max(batches.PATIENCE, fetcher.PATIENCE + remote.START_PATIENCE),
        "save": timeouts.SAVER,
        "waiting save": max(timeouts.SAVER, SETTINGS.grace_seconds),
        "rollback": timeouts.SAVER,
        "finish": timeouts.UPLOAD + tracking.FINISH_SECONDS,
    }
    for phase in timeouts.PATIENCE:
        floor = timeouts.floor(phase, SETTINGS)
        assert wrapped.get(phase, 0.0) < floor < timeouts.LONGEST or (phase not in wrapped and floor == 0.0), phase
    assert timeouts.floor("waiting save", HealthConfig(grace_seconds=7200)) > 7200


@pytest.mark.parametrize("hang_seconds", [0.0, 300.0, 7200.0])
def test_no_collective_is_aborted_before_the_watchdog_speaks(hang_seconds):
    settings = HealthConfig(hang_seconds=hang_seconds)
    longest = max(timeouts.deadline(p, past, settings) for p in timeouts.PATIENCE for past in (None, 0.1, 1e6))
    assert longest + 2 * watchdog.ANSWER_SECONDS + flight_recorder.SECONDS < timeouts.collectives(hang_seconds)


def test_a_deadline_follows_the_past_between_its_bounds():
    assert timeouts.deadline("forward", None, SETTINGS) == timeouts.FIRST
    assert timeouts.deadline("forward", 0.1, SETTINGS) == SETTINGS.hang_seconds
    assert timeouts.deadline("forward", 50.0, SETTINGS) == 500.0
    assert timeouts.deadline("forward", 1000.0, SETTINGS) == timeouts.LONGEST
    assert timeouts.deadline("data", 0.1, SETTINGS) > batches.PATIENCE


def test_every_phase_of_the_watchdog_is_in_the_table():
    named = set()
    for path in Path(repa_scale.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
                "enter",
                "stopping",
            ):
                named |= {word.value for word in node.args[:1] if isinstance(word, ast.Constant)}
    assert named == set(timeouts.PATIENCE) - {"start-up"}


class StoreRanks(Ranks):
    """Ranks of one process, which share a store."""

    shared = None

    def store(self) -> dist.Store:
        return StoreRanks.shared


@pytest.fixture
def two(monkeypatch, tmp_path):
    """The watchdogs of two ranks, on one store; `ended` holds what they would have ended with."""
    StoreRanks.shared = dist.HashStore()
    ended: list[str] = []
    monkeypatch.setattr(watchdog, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(watchdog, "FAILURE_SECONDS", 0.01)
    monkeypatch.setattr(Watchdog, "_end", lambda self, what: ended.append(f"rank {self.ranks.rank} {what}"))
    (tmp_path / "log").mkdir()
    settings = HealthConfig(hang_seconds=0.5)
    run = Notes()
    watched = [
        Watchdog(StoreRanks(rank, rank, 2, torch.device("cpu")), tmp_path, run if rank == 0 else None, settings, float)
        for rank in (0, 1)
    ]
    for each in watched:
        for phase in ("forward", "data", "forward"):
            each.enter(phase, 1)
    yield watched, ended, run
    for each in watched:
        each.close()


class Notes:
    """What a run folder is told."""

    def __init__(self):
        self.told = []

    def incident(self, kind, **facts):
        self.told.append((kind, facts["reason"]))

    def fail(self, reason, **facts):
        self.told.append(("failed", reason))


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_rank_in_a_collective_waits_for_one_whose_loader_will_speak(two):
    (first, second), ended, _ = two
    second.enter("data", 2)
    first.enter("forward", 2)
    time.sleep(1.2)
    assert not ended, "the loader gives up by itself, after ten minutes"
    second.enter("forward", 2)  # the batch came
    assert until(lambda: len(ended) >= 2) and "hung in forward of step 2" in ended[0]


def test_a_hang_in_a_collective_is_told_at_once(two):
    (first, _), ended, _ = two
    first.enter("forward", 2)
    assert until(lambda: ended) and "hung in forward" in ended[0]


def test_an_error_of_another_rank_reaches_the_status(two, monkeypatch):
    (_, second), _, run = two
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", second.ranks.store)
    watchdog.report_failure(second.ranks, "RuntimeError: laid by the test")
    assert until(lambda: len(run.told) == 2)
    assert [kind for kind, _ in run.told] == ["rank_failed", "failed"]
    assert "rank 1 on" in run.told[0][1] and "laid by the test" in run.told[0][1]


def test_the_status_names_the_rank_that_failed_and_not_the_lost_connection(two, monkeypatch):
    (first, second), _, _ = two
    lost = RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.2]:61111. GLHF!")
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", second.ranks.store)
    assert watchdog.cause(lost).startswith(LOST) and "closed by peer" in watchdog.cause(lost)
    first.close()  # rank 0 ends by its own error, before its watchdog has read the report
    watchdog.report_failure(second.ranks, "ValueError: laid by the test")
    watchdog.report_failure(second.ranks, "RuntimeError: of a rank that lost the first")
    assert watchdog.cause(lost).endswith("failed: ValueError: laid by the test")
    assert watchdog.cause(ValueError("its own")) == "ValueError: its own"


@pytest.mark.parametrize("killed", [True, False])
def test_launch_names_the_killed_rank_and_not_the_one_that_lost_it(killed, monkeypatch, capsys):
    monkeypatch.setattr(job, "CAUSE_SECONDS", 0.2)
    told = job.Job(SimpleNamespace(host_of=lambda rank: f"node-{rank}"))
    events = [{"event": "ended", "rank": 0, "code": 70, "what": "ended with code 70", "error": f"{LOST} (closed)"}]
    if killed:
        events.append({"event": "ended", "rank": 1, "code": -9, "what": "was killed by SIGKILL", "error": ""})
    for event in events:
        told._take(None, event)
    told._take(*told.inbox.get(timeout=5))
    assert told.problem == (
        "rank 1 on node-1 was killed by SIGKILL" if killed else f"rank 0 on node-0 ended with code 70: {LOST} (closed)"
    )
    assert told.ended.keys() == ({0, 1} if killed else {0})


def test_the_flight_recorder_is_on_and_writes_into_the_run(tmp_path):
    environment = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}
    flight_recorder.prepare(tmp_path / "log", environment)
    assert environment == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "log" / flight_recorder.PREFIX),
    }


def test_nccls_recorder_is_dumped_and_may_be_stuck(tmp_path, monkeypatch):
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda **_: b"trace", raising=False)
    path = flight_recorder.dump(tmp_path, 3, "cuda")
    assert path.name == "flight_recorder_rank_3" and path.read_bytes() == b"trace"
    stuck = threading.Event()
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda **_: str(stuck.wait()).encode())
    monkeypatch.setattr(flight_recorder, "SECONDS", 0.1)
    assert flight_recorder.dump(tmp_path, 4, "cuda") is None
    stuck.set()
    monkeypatch.delattr(c10d, "_dump_nccl_trace")
    assert flight_recorder.dump(tmp_path, 5, "cuda") is None


def test_a_dump_holds_the_collectives(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(1))
        found = pickle.loads(flight_recorder.dump(tmp_path, 0, "cpu").read_bytes())
    finally:
        dist.destroy_process_group()
    assert [entry["profiling_name"] for entry in found["entries"]][-1] == "gloo:all_reduce", json.dumps(found)[:300]
