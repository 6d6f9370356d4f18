"""The comparison from an MLflow store: the group that belongs together, the rows that count, the report in MLflow."""

import json

import numpy as np
import pytest

from benchmarks.evaluate_compare import EXPERIMENT, METRIC, fill
from repa_scale.cli import main
from repa_scale.compare.read_mlflow import find_group, open_store, read_run
from repa_scale.compare.run_data import count


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two seeds of each method, REPA three times as fast."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    fill(uri, 4, 2000)
    return uri


def test_a_sweep_is_found_compared_and_logged(store, tmp_path, capsys):
    words = ["compare", "--uri", store, "--experiment", EXPERIMENT, "--out", str(tmp_path / "report"), "--log"]
    assert main(words) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "report" / "compare.json").read_text())
    assert list(result["runs"]) == ["repa-seed0", "repa-seed1", "baseline-seed0", "baseline-seed1"]
    assert result["headline"].startswith("REPA reaches the baseline's final FID (50,000 samples)")
    ratio = result["metrics"]["fid_n50000"]["targets"]["repa"][0]["axes"]["steps"]
    assert ratio["ratio"] == pytest.approx(3.0, rel=0.05) and ratio["low"] < 3.0 < ratio["high"]
    client = open_store(store)
    logged = out.rsplit("MLflow: run ", 1)[1].split()[0]
    run = client.get_run(logged)
    assert run.info.run_name == "comparison" and run.data.tags["headline"] == result["headline"]
    assert run.data.metrics["speed_up/repa/steps"] == ratio["ratio"]
    files = {entry.path for entry in client.list_artifacts(logged)}
    assert files == {"index.html", "compare.json", "headline.png"}
    assert logged not in find_group(client, EXPERIMENT), "a report is no run"


def test_evaluations_come_with_their_intervals_and_protocol(store):
    client = open_store(store)
    run = read_run(client, find_group(client, EXPERIMENT)[0])
    assert len(run.evaluations) == 16 and {one.metric for one in run.evaluations} == {"fid"}
    one = run.evaluations[-1]
    assert one.count == 50_000 and one.protocol == {"extractor": "inception"}
    assert (one.low, one.high) == (pytest.approx(0.99 * one.value), pytest.approx(1.01 * one.value))
    assert METRIC not in run.history and METRIC not in run.tags
    assert len(run.history["loss"]) == len(run.rows.steps) == 100


def test_the_query_and_the_client_read_the_same(store, monkeypatch):
    from repa_scale.compare import read_mlflow

    client = open_store(store)
    run_id = find_group(client, EXPERIMENT)[0]
    ours = read_run(client, run_id)

    def gone(*_):
        raise read_mlflow.sqlite3.OperationalError("no such table")

    monkeypatch.setattr(read_mlflow, "_query", gone)
    theirs = read_run(client, run_id)
    assert set(ours.history) == set(theirs.history) and ours.evaluations == theirs.evaluations
    for key, history in ours.history.items():
        assert np.array_equal(history.steps, theirs.history[key].steps)
        assert np.array_equal(history.values, theirs.history[key].values)


def test_of_repeated_steps_the_row_of_the_highest_attempt_counts_as_a_whole():
    """Step 2 was trained in attempt 1 and again in attempt 2, where its norm was not finite; the clock went back."""
    steps = {"attempt": np.array([1, 2, 2, 3]), "loss": np.array([1, 2, 2, 3]), "norm": np.array([1, 2, 3])}
    stamps = {"attempt": np.array([10, 30, 20, 40]), "loss": np.array([10, 30, 20, 40]), "norm": np.array([10, 30, 40])}
    values = {"attempt": np.array([1.0, 1, 2, 2]), "loss": np.array([5.0, 6, 7, 8]), "norm": np.array([0.1, 0.2, 0.3])}
    rows, history = count(steps, stamps, values)
    assert rows.steps.tolist() == [1, 2, 3] and rows.attempts.tolist() == [1, 2, 2]
    assert rows.times.tolist() == [0.01, 0.02, 0.04]
    assert history["loss"].values.tolist() == [5, 7, 8] and history["norm"].steps.tolist() == [1, 3]


def test_stores_that_hold_nothing_to_compare(store, tmp_path, capsys):
    from repa_scale.tracking import mlflow_client

    client = mlflow_client(store)
    client.create_experiment("empty")
    stranger = client.create_run(client.create_experiment("strange")).info.run_id

    def refused(*words):
        assert main(["compare", "--uri", store, "--out", str(tmp_path / "report"), *words]) == 64
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "it has no run with a pair_id" in refused("--experiment", "empty")
    one = find_group(client, EXPERIMENT)[0]
    assert "not one of `repa-scale train`" in refused("--runs", one, stranger)
    assert "is not in this store" in refused("--runs", one, "0" * 32)
    assert "one run cannot be compared" in refused("--runs", one)
    assert not (tmp_path / "report").exists()
