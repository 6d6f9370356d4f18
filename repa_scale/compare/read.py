"""What MLflow holds of two runs: settings, metric histories, pictures. Reads only, and from MLflow only."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repa_scale.errors import DataError, did_you_mean, require

SECONDS_TO_WAIT = "10"  # for a server that does not answer


@dataclass(frozen=True)
class Point:
    """One value of a metric: the optimiser step, unix time in seconds, and the value as metrics.jsonl has it."""

    step: int
    time: float
    value: float


@dataclass(frozen=True)
class RunData:
    """One run as MLflow holds it.

    Attributes:
        params: the flattened configuration.
        history: by metric, in the order of the steps; of values with one step the latest, as in the run folder.
        grids: (step, PNG) of the sample grids, in the order of the steps.
    """

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    history: dict[str, list[Point]] = field(repr=False)
    grids: list[tuple[int, bytes]] = field(repr=False)

    @property
    def method(self) -> str:
        return self.tags.get("method", "unknown")


def open_store(uri: str) -> Any:
    """A client of an existing store.

    Raises:
        DataError: there is no such database file, or the server does not answer.
    """
    require("mlflow", "track")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", SECONDS_TO_WAIT)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.is_file():
        raise DataError(f"--uri {uri}: {file} does not exist; give the tracking.uri of the runs")
    client = MlflowClient(tracking_uri=uri)
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"--uri {uri} cannot be read ({reason[:160]}); is the server up?") from None
    return client


def find_pair(client: Any, experiment: str, pair_id: str = "") -> tuple[str, str]:
    """Run ids of the newest REPA run that has a baseline of the same pair and seed, and of that baseline.

    Raises:
        DataError: no such experiment, or no pair in it.
    """
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = [e.name for e in client.search_experiments()]
        raise DataError(f"--experiment {experiment} is not in this store{did_you_mean(experiment, names)}")
    runs = client.search_runs([found.experiment_id], order_by=["attributes.start_time DESC"], max_results=1000)
    newest: dict[tuple[str, str, str], str] = {}
    for run in runs:
        tags = run.data.tags
        if "pair_id" in tags and (not pair_id or tags["pair_id"] == pair_id):
            newest.setdefault((tags["pair_id"], tags.get("seed", ""), tags.get("method", "")), run.info.run_id)
    for (pair, seed, method), run_id in newest.items():
        if method == "repa" and (pair, seed, "baseline") in newest:
            return run_id, newest[pair, seed, "baseline"]
    have = ", ".join(f"{method} (pair {pair}, seed {seed})" for pair, seed, method in newest) or "no run with a pair_id"
    raise DataError(
        f"experiment {experiment} has no REPA run and baseline of the same pair and seed; it has {have}; "
        "train the other one with the same settings, or name two runs with --runs"
    )


def read_run(client: Any, run_id: str) -> RunData:
    """All that is compared of a run.

    Raises:
        DataError: no such run, or one without metrics.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException:
        raise DataError(f"run {run_id} is not in this store; give the run ids that MLflow shows") from None
    history = {key: _history(client, run_id, key) for key in sorted(run.data.metrics)}
    if not history.get("denoising_loss"):
        raise DataError(f"run {run_id} ({run.info.run_name}) has no metrics yet; wait for its first logged step")
    return RunData(
        run_id=run_id,
        name=run.info.run_name,
        status=run.info.status,
        params=dict(run.data.params),
        tags={key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")},
        history=history,
        grids=_grids(client, run_id),
    )


def _history(client: Any, run_id: str, key: str) -> list[Point]:
    latest: dict[int, Any] = {}
    for metric in client.get_metric_history(run_id, key):
        if metric.step not in latest or metric.timestamp >= latest[metric.step].timestamp:
            latest[metric.step] = metric
    return [Point(step, latest[step].timestamp / 1000, latest[step].value) for step in sorted(latest)]


def _grids(client: Any, run_id: str) -> list[tuple[int, bytes]]:
    grids = []
    with tempfile.TemporaryDirectory() as folder:
        for entry in client.list_artifacts(run_id, "samples"):
            name = Path(entry.path).stem
            if entry.path.endswith(".png") and name.startswith("step_"):
                file = client.download_artifacts(run_id, entry.path, folder)
                grids.append((int(name.removeprefix("step_")), Path(file).read_bytes()))
    return sorted(grids)
