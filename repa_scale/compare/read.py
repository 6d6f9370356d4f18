"""What MLflow holds of two runs: settings, metric histories, pictures. Reads only, and from MLflow only."""

from __future__ import annotations

import sqlite3
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repa_scale.errors import DataError, did_you_mean, reason, require
from repa_scale.redact import redacted
from repa_scale.tracking import mlflow_client


@dataclass(frozen=True)
class Point:
    """One value of a metric: the optimiser step, unix time in seconds, and the value as metrics.jsonl has it."""

    step: int
    time: float
    value: float


@dataclass(frozen=True)
class Row:
    """A row of metrics.jsonl that counts: of one step the highest attempt, of equal attempts the later."""

    step: int
    time: float
    attempt: int


@dataclass(frozen=True)
class RunData:
    """One run as MLflow holds it.

    Attributes:
        params: the flattened configuration.
        rows: in the order of the steps.
        history: by metric, its values in `rows`.
        grids: (step, PNG) of the sample grids, in the order of the steps.
        problems: what of the run could not be read.
    """

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    rows: list[Row] = field(repr=False)
    history: dict[str, list[Point]] = field(repr=False)
    grids: list[tuple[int, bytes]] = field(repr=False)
    problems: list[str]

    @property
    def method(self) -> str:
        return self.tags.get("method", "unknown")


def open_store(uri: str) -> Any:
    """A client of an existing store; nothing is created or changed.

    Raises:
        DataError: there is no such database, it is not MLflow's, or the server does not answer.
    """
    require("mlflow", "track")
    shown = redacted(uri)
    if uri.startswith("sqlite:///"):
        _check_file(shown, Path(uri.removeprefix("sqlite:///").partition("?")[0]))
    try:
        client = mlflow_client(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # of MLflow, SQLAlchemy or a database driver
        hint = "is the server up?" if uri.startswith("http") else "give the tracking.uri of the runs"
        raise DataError(f"--uri {shown} cannot be read ({redacted(reason(error))}); {hint}") from None
    return client


def _check_file(shown: str, file: Path) -> None:
    """MLflow would create a missing file, and fill any other database with its tables."""
    if not file.is_file():
        raise DataError(f"--uri {shown}: {file} does not exist; give the tracking.uri of the runs")
    try:
        database = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
        try:
            found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone()
        finally:
            database.close()
    except sqlite3.Error as error:
        raise DataError(f"--uri {shown}: {file} cannot be read ({error}); give the tracking.uri of the runs") from None
    if found is None:
        raise DataError(f"--uri {shown}: {file} is not an MLflow store; give the tracking.uri of the runs")


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
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise DataError(f"run {run_id} cannot be read ({redacted(reason(error))}); try again") from None
        raise DataError(f"run {run_id} is not in this store; give the run ids that MLflow shows") from None
    rows, history = _counting({key: client.get_metric_history(run_id, key) for key in sorted(run.data.metrics)})
    if not history.get("denoising_loss"):
        raise DataError(f"run {run_id} ({run.info.run_name}) has no metrics yet; wait for its first logged step")
    problems: list[str] = []
    return RunData(
        run_id=run_id,
        name=run.info.run_name,
        status=run.info.status,
        params=dict(run.data.params),
        tags={key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")},
        rows=rows,
        history=history,
        grids=_grids(client, run_id, problems),
        problems=problems,
    )


def _counting(points: dict[str, list]) -> tuple[list[Row], dict[str, list[Point]]]:
    """The rows that count, and their values by metric.

    The values of a row share its step and timestamp. A step that a resumed run repeated has several rows, of which one
    counts as a whole: a value that only the others have (it was not finite in the one that counts) is left out.

    Args:
        points: MLflow's metrics by key.
    """
    attempts = {(m.step, m.timestamp): 1 for metrics in points.values() for m in metrics}
    attempts.update({(m.step, m.timestamp): int(m.value) for m in points.get("attempt", [])})
    counts: dict[int, tuple[int, int]] = {}
    for (step, stamp), attempt in attempts.items():
        counts[step] = max(counts.get(step, (0, 0)), (attempt, stamp))
    rows = [Row(step, counts[step][1] / 1000, counts[step][0]) for step in sorted(counts)]
    history = {}
    for key, metrics in points.items():
        values = {m.step: m.value for m in metrics if m.timestamp == counts[m.step][1]}
        history[key] = [Point(row.step, row.time, values[row.step]) for row in rows if row.step in values]
    return rows, history


def _grids(client: Any, run_id: str, problems: list[str]) -> list[tuple[int, bytes]]:
    grids = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for entry in client.list_artifacts(run_id, "samples"):
                name = Path(entry.path).stem
                if entry.path.endswith(".png") and name.removeprefix("step_").isdigit():
                    file = client.download_artifacts(run_id, entry.path, folder)
                    grids.append((int(name.removeprefix("step_")), Path(file).read_bytes()))
    except Exception as error:  # the numbers are worth a report without pictures
        problems.append(f"sample grids cannot be read ({redacted(reason(error))})")
    return sorted(grids)
