"""The mirror in MLflow against real stores: an SQLite file, and a real server that goes away and comes back."""

import json
import logging
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from launching import free_port

from repa_scale.config import Config
from repa_scale.pictures import save_sheet
from repa_scale.redact import redacted
from repa_scale.tracking import Tracker, flatten, numbers, open_tracker

mlflow = pytest.importorskip("mlflow")

TAGS = {"method": "repa", "pair_id": "p", "seed": "0"}
DATA = SimpleNamespace(
    name="digits", count=1797, fingerprint="f" * 32, class_names=list("0123456789"), image_size=8, path="."
)


def make_run(folder, attempt=1):
    """A run folder as the trainer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "status.json").write_text(json.dumps({"attempt": attempt}))
    return folder


def write_rows(folder, steps, attempt=1):
    rows = []
    for step in steps:
        row = {
            "step": step,
            "attempt": attempt,
            "time": time.time(),
            "loss": 1 / (3 * step),
            "denoising_loss": step / 7,
        }
        rows.append({**row, "grad_norm": "inf" if step == 2 else 0.1 * step, "batch_fingerprint": "00ff"})
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def config_for(uri, **changes):
    config = Config()
    config.tracking.uri, config.tracking.experiment = uri, "tests"
    config.run.name = "run"
    for key, value in changes.items():
        setattr(config.train, key, value)
    return config


def history(uri, run_id, key):
    client = mlflow.MlflowClient(uri)
    return {m.step: m.value for m in sorted(client.get_metric_history(run_id, key), key=lambda m: m.timestamp)}


def test_everything_arrives_exactly_and_a_resume_goes_on_in_the_same_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/store.db"
    run = make_run(tmp_path / "run")
    rows = write_rows(run, range(1, 4))
    tracker = open_tracker(config_for(uri), run, TAGS, DATA)
    tracker.log(3, {}, 0.0)
    save_sheet(np.zeros((4, 8, 8, 3), np.uint8), run / "samples" / "step_00000003.png")
    tracker.log_artifact(run / "samples" / "step_00000003.png", "samples")
    tracker.finish("preempted")

    client = mlflow.MlflowClient(uri)
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    stored = client.get_run(run_id)
    assert stored.info.status == "KILLED" and stored.data.tags["pair_id"] == "p"
    assert stored.data.params["train.global_batch"] == "256" and stored.data.params["alignment.repa.depth"] == "8"
    assert stored.inputs.dataset_inputs[0].dataset.digest == "f" * 32
    assert {a.path for a in client.list_artifacts(run_id)} == {"config.yaml", "samples"}
    assert (tmp_path / "mlartifacts").is_dir() and not (tmp_path / "mlruns").exists()
    for key in ("loss", "denoising_loss"):
        assert history(uri, run_id, key) == {row["step"]: row[key] for row in rows}
    assert history(uri, run_id, "grad_norm") == {1: 0.1, 3: 0.1 * 3}, "what is not finite is left out"

    make_run(run, attempt=2)
    more = write_rows(run, range(3, 6), attempt=2)
    tracker = open_tracker(config_for(uri, steps=7), run, TAGS, DATA)
    tracker.finish("completed")
    assert json.loads((run / "mlflow.json").read_text())["run_id"] == run_id
    assert history(uri, run_id, "loss") == {row["step"]: row["loss"] for row in [*rows[:2], *more]}
    stored = client.get_run(run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params["train.steps"] == "400000" and stored.data.tags["attempt_2.train.steps"] == "7"


@pytest.fixture
def server(tmp_path):
    """A real MLflow server on an SQLite file, to be stopped and started by the test."""
    port = free_port()
    processes = []

    def start():
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{tmp_path}/server.db",
            "--artifacts-destination",
            str(tmp_path / "art"),
        ]
        log = (tmp_path / "server.log").open("a")
        processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    def stop():
        import os
        import signal

        while processes:
            process = processes.pop()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    yield SimpleNamespace(uri=f"http://127.0.0.1:{port}", start=start, stop=stop)
    stop()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.distributed
def test_a_server_that_is_away_costs_nothing_and_loses_nothing(server, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("repa_scale.tracking.RETRY_SECONDS", (0.2, 0.5))
    monkeypatch.setattr("repa_scale.tracking.FINISH_SECONDS", 60.0)
    run = make_run(tmp_path / "run")
    with caplog.at_level(logging.WARNING, logger="repa_scale"):
        began = time.perf_counter()
        tracker = open_tracker(config_for(server.uri), run, TAGS, DATA)
        rows = write_rows(run, range(1, 50))
        for step in range(1, 50):
            tracker.log(step, {}, 0.0)
        assert time.perf_counter() - began < 1.0, "an unreachable server must not hold up training"
        wait_for(lambda: "training goes on" in caplog.text)
    server.start()
    cursor = run / "mlflow.json"
    wait_for(lambda: cursor.exists() and json.loads(cursor.read_text())["sent_bytes"] > 0)
    server.stop()
    rows += write_rows(run, range(50, 80))
    tracker.log(79, {}, 0.0)
    time.sleep(0.5)
    server.start()
    tracker.finish("completed")
    run_id = json.loads(cursor.read_text())["run_id"]
    assert history(server.uri, run_id, "loss") == {row["step"]: row["loss"] for row in rows}
    assert mlflow.MlflowClient(server.uri).get_run(run_id).info.status == "FINISHED"


def test_a_server_that_never_comes_does_not_hold_up_the_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("repa_scale.tracking.FINISH_SECONDS", 0.5)
    run = make_run(tmp_path / "run")
    write_rows(run, [1])
    tracker = open_tracker(config_for(f"http://127.0.0.1:{free_port()}"), run, TAGS, DATA)
    with caplog.at_level(logging.WARNING, logger="repa_scale"):
        began = time.perf_counter()
        tracker.finish("completed")
        assert time.perf_counter() - began < 2.0 and "nothing is lost" in caplog.text
    # The next start of the run, with a store that answers, sends it.
    uri = f"sqlite:///{tmp_path}/store.db"
    monkeypatch.setattr("repa_scale.tracking.FINISH_SECONDS", 60.0)
    open_tracker(config_for(uri), run, TAGS, DATA).finish("completed")
    assert history(uri, json.loads((run / "mlflow.json").read_text())["run_id"], "loss") == {1: 1 / 3}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The URI of one SQLite store for the tests that need no store of their own."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/store.db"


def sent_run(uri, folder):
    """A run that was sent and finished: (client, run id)."""
    open_tracker(config_for(uri), folder, TAGS, DATA).finish("completed")
    return mlflow.MlflowClient(uri), json.loads((folder / "mlflow.json").read_text())["run_id"]


def test_the_end_is_seen_even_between_two_looks(store, tmp_path):
    run = make_run(tmp_path / "run")
    write_rows(run, [1])
    tracker = open_tracker(config_for(store), run, TAGS, DATA)
    wait_for(lambda: (run / "mlflow.json").exists() and json.loads((run / "mlflow.json").read_text())["sent_files"])

    class EndsWhileCleared(threading.Event):
        def clear(self):
            tracker._final = "completed"
            self.set()
            super().clear()

    waiting, tracker._wake = tracker._wake, EndsWhileCleared()
    waiting.set()
    assert tracker._drained.wait(20), "the thread sleeps on an end that was already announced"


def test_a_run_deleted_in_mlflow_is_made_anew(store, tmp_path):
    run = make_run(tmp_path / "run")
    rows = write_rows(run, [1, 3])
    client, first = sent_run(store, run)
    client.delete_run(first)
    _, second = sent_run(store, run)
    assert second != first and history(store, second, "loss") == {row["step"]: row["loss"] for row in rows}


def test_a_damaged_line_and_a_replaced_file_do_not_stop_the_rest(store, tmp_path):
    run = make_run(tmp_path / "run")
    rows = write_rows(run, [1])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ti{"step": 2}\n[]\n{"step": 2}\n')
    rows += write_rows(run, [3])
    _, run_id = sent_run(store, run)
    assert history(store, run_id, "loss") == {row["step"]: row["loss"] for row in rows}
    (run / "metrics.jsonl").unlink()
    rows += write_rows(run, [4])
    assert sent_run(store, run)[1] == run_id
    assert history(store, run_id, "loss") == {row["step"]: row["loss"] for row in rows}


def test_files_that_the_store_refuses_do_not_hide_how_the_run_ended(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("repa_scale.tracking.FINISH_SECONDS", 3.0)
    uri = f"sqlite:///{tmp_path}/store.db"
    (tmp_path / "a_file").write_text("")
    mlflow.MlflowClient(uri).create_experiment("tests", f"file://{tmp_path}/a_file/below")
    run = make_run(tmp_path / "run")
    write_rows(run, [1])
    with caplog.at_level(logging.WARNING, logger="repa_scale"):
        client, run_id = sent_run(uri, run)
    assert client.get_run(run_id).info.status == "FINISHED" and history(uri, run_id, "loss") == {1: 1 / 3}
    assert "0 rows and 1 files are not sent" in caplog.text


def test_a_creation_whose_answer_was_lost_is_not_repeated(store, tmp_path):
    run = make_run(tmp_path / "run")
    tracker = open_tracker(config_for(store), run, TAGS, DATA)
    tracker.finish("completed")
    cursor = json.loads((run / "mlflow.json").read_text())
    assert tracker._create_run(mlflow.MlflowClient(store))["run_id"] == cursor["run_id"]


def test_passwords_stay_out_of_everything(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("repa_scale.tracking.FINISH_SECONDS", 1.0)
    run = make_run(tmp_path / "run")
    port = free_port()
    with caplog.at_level(logging.DEBUG, logger="repa_scale"):
        tracker = open_tracker(config_for(f"http://me:hush@127.0.0.1:{port}"), run, TAGS, DATA)
        wait_for(lambda: "training goes on" in caplog.text)
        tracker.finish("failed")
    assert str(port) in caplog.text and "hush" not in caplog.text
    monkeypatch.setattr("repa_scale.tracking.FINISH_SECONDS", 30.0)
    uri = f"sqlite:///{tmp_path}/store.db?password=hush"  # SQLite takes it for a part of the address
    tags = {**TAGS, "command": f"repa-scale train tracking.uri={uri} x=http://me:hush@host"}
    open_tracker(config_for(uri), run, tags, DATA).finish("completed")
    cursor = (run / "mlflow.json").read_text()
    stored = mlflow.MlflowClient(f"sqlite:///{tmp_path}/store.db").get_run(json.loads(cursor)["run_id"]).data
    assert stored.params["tracking.uri"].endswith("?password=***")
    assert "hush" not in cursor + str(stored.params) + str(stored.tags)


def test_tracking_can_be_off(tmp_path):
    tracker = open_tracker(config_for("none"), tmp_path, {}, None)
    assert type(tracker) is Tracker
    tracker.log(1, {}, 0.0)
    tracker.finish("completed")
    assert list(tmp_path.iterdir()) == []


def test_small_helpers():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}
    assert redacted("postgresql://me:p@ss/w@host/db") == "postgresql://me:***@host/db"
    assert redacted("see http://host:5000/api and a@b") == "see http://host:5000/api and a@b"
    assert numbers({"step": 1, "time": 2.0, "loss": 3, "x": float("inf"), "s": "text"}) == {"loss": 3.0}
