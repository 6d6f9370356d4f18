"""A run as MLflow has it, and which runs of an experiment belong together. Reads only."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from repa_scale.compare.read_folder import besides
from repa_scale.compare.run_data import FINISHED, RunData, configuration, count, identity_of
from repa_scale.errors import DataError, did_you_mean, reason, require
from repa_scale.evaluations import PREFIX, Evaluation
from repa_scale.redact import redacted
from repa_scale.tracking import mlflow_client

# What the comparison shows. A store may hold more, which is not read.
KEYS = (
    "attempt", "denoising_loss", "alignment_loss", "loss", "grad_norm", "images_per_second", "step_seconds",
    "data_wait_seconds", "encoder_seconds", "latent_seconds", "alignment_seconds", "peak_memory_bytes", "goodput",
    "productive_seconds", "skipped_steps",
)  # fmt: skip
LOST = "lost_"
THREADS = 8  # requests to a server at a time

Points = tuple[np.ndarray, np.ndarray, np.ndarray]  # steps, stamps in ms: (n,) int64; values: (n,) float64


def open_store(uri: str) -> Any:
    """A client of an existing store; nothing is created or changed.

    Raises:
        DataError: there is no such database, it is not MLflow's, or the server does not answer.
    """
    require("mlflow", "track")
    shown = redacted(uri)
    if uri.startswith("sqlite:///"):
        _check_file(shown, _database(uri))
    try:
        client = mlflow_client(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # of MLflow, SQLAlchemy or a database driver
        hint = "is the server up?" if uri.startswith("http") else "give the tracking.uri of the runs"
        raise DataError(f"--uri {shown} cannot be read ({redacted(reason(error))}); {hint}") from None
    return client


def find_group(client: Any, experiment: str, pair_id: str = "") -> list[str]:
    """Run ids of the newest group of runs with one pair id that has a REPA run and a baseline: all methods, alignment
    settings and seeds of it, of each the newest that ended well, else the newest.

    Raises:
        DataError: no such experiment, or no such group in it.
    """
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = [e.name for e in client.search_experiments()]
        raise DataError(f"--experiment {experiment} is not in this store{did_you_mean(experiment, names)}")
    groups: dict[str, dict[tuple[str, ...], Any]] = {}
    token, empty = None, True
    while token or empty:
        page = client.search_runs(
            [found.experiment_id], order_by=["attributes.start_time DESC"], max_results=1000, page_token=token
        )
        for run in page:
            tags = run.data.tags
            if "pair_id" not in tags or (pair_id and tags["pair_id"] != pair_id):
                continue
            which = tags.get("method", ""), tags.get("seed", ""), tags.get("identity_hash", "")
            group = groups.setdefault(tags["pair_id"], {})
            if which not in group or (group[which].info.status != FINISHED and run.info.status == FINISHED):
                group[which] = run
        token, empty = page.token, False
    for group in groups.values():
        if {"repa", "baseline"} <= {method for method, _, _ in group}:
            return [run.info.run_id for run in group.values()]
    have = [f"{method} (pair {pair}, seed {seed})" for pair, group in groups.items() for method, seed, _ in group]
    raise DataError(
        f"experiment {experiment} has no REPA run and baseline of the same pair; it has "
        f"{', '.join(have) or 'no run with a pair_id'}; "
        "train the other one with the same settings, or name runs with --runs"
    )


def read_run(client: Any, run_id: str) -> RunData:
    """All that is compared of a run. What MLflow lacks is taken from its folder, where that lies on this machine.

    Raises:
        DataError: no such run, or one without metrics.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise DataError(f"run {run_id} cannot be read ({redacted(reason(error))}); try again") from None
        raise DataError(
            f"run {run_id} is not in this store; give the run ids that MLflow shows, or run folders"
        ) from None
    tags, params = dict(run.data.tags), dict(run.data.params)
    if "model.name" not in params:
        raise DataError(f"run {run_id} ({run.info.run_name}) is not one of `repa-scale train`; leave it out")
    known = [key for key in run.data.metrics if key in KEYS or key.startswith((LOST, "alignment_loss/"))]
    points = _histories(client, run_id, [*known, *(key for key in run.data.metrics if key.startswith(PREFIX))])
    rows, history = count(*({key: points[key][part] for key in known} for part in range(3)))
    if not len(history.get("denoising_loss", ())):
        raise DataError(f"run {run_id} ({run.info.run_name}) has no metrics yet; wait for its first logged step")
    problems: list[str] = []
    config = configuration(params)
    evaluated, representation, incidents = _evaluations(points, tags), [], None
    if (extra := besides(Path(tags.get("run_dir", "")), run_id)) is not None:
        later, representation, incidents = extra
        evaluated = list({(one.name, one.step): one for one in (*evaluated, *later)}.values())
    return RunData(
        run_id=run_id,
        name=run.info.run_name,
        status=run.info.status,
        source=redacted(client.tracking_uri),
        params=params,
        tags={key: value for key, value in tags.items() if not key.startswith(("mlflow.", PREFIX))},
        rows=rows,
        history=history,
        grids=_grids(client, run_id, problems),
        evaluations=sorted(evaluated, key=lambda one: (one.name, one.step)),
        representation=representation,
        incidents=incidents,
        problems=problems,
        config=config,
        identity=identity_of(config, tags.get("data_fingerprint", "")),
    )


def _database(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def _check_file(shown: str, file: Path) -> None:
    """MLflow would create a missing file, and fill any other database with its tables."""
    if not file.is_file():
        raise DataError(f"--uri {shown}: {file} does not exist; give the tracking.uri of the runs")
    try:
        with closing(_read_only(file)) as database:
            found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone()
    except sqlite3.Error as error:
        raise DataError(f"--uri {shown}: {file} cannot be read ({error}); give the tracking.uri of the runs") from None
    if found is None:
        raise DataError(f"--uri {shown}: {file} is not an MLflow store; give the tracking.uri of the runs")


def _read_only(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)


def _histories(client: Any, run_id: str, keys: Iterable[str]) -> dict[str, Points]:
    """Every logged point of each key.

    From an SQLite file by a query of our own: MLflow's client makes an object of each point, which takes 40 times as
    long (a minute and a half for two million points). Where MLflow's tables are not those that we know, the client is
    asked after all.
    """
    keys = list(keys)
    if client.tracking_uri.startswith("sqlite:///"):
        try:
            with closing(_read_only(_database(client.tracking_uri))) as database:
                return {key: _query(database, run_id, key) for key in keys}
        except sqlite3.Error:
            pass
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda key: client.get_metric_history(run_id, key), keys))
    return {
        key: _points([(point.step, point.timestamp, point.value) for point in points])
        for key, points in zip(keys, found, strict=True)
    }


def _query(database: sqlite3.Connection, run_id: str, key: str) -> Points:
    where = "FROM metrics WHERE run_uuid = ? AND key = ? AND is_nan = 0"
    return _points(database.execute(f"SELECT step, timestamp, value {where}", (run_id, key)).fetchall())


def _points(rows: list[tuple[int, int, float]]) -> Points:
    if not rows:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    # Steps and milliseconds are whole numbers far below 2**53, so they survive float64.
    table = np.array(rows, np.float64)
    return table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2].copy()


def _evaluations(points: dict[str, Points], tags: dict[str, str]) -> list[Evaluation]:
    """Of each step the newest; the protocol stands in the tag of the metric's name."""
    found = []
    bounds = {f"{key}_{end}" for key in points for end in ("low", "high")}
    for key in points:
        if not key.startswith(PREFIX) or key in bounds:
            continue
        metric, _, samples = key.removeprefix(PREFIX).rpartition("_n")
        if not samples.isdigit():
            continue
        try:
            protocol = json.loads(tags[key])
        except (KeyError, ValueError):
            protocol = {}
        protocol = {name: value for name, value in protocol.items() if name not in ("low", "high")}
        ends = [_newest(points.get(f"{key}_{end}")) for end in ("low", "high")]
        for step, (stamp, value) in _newest(points[key]).items():
            low, high = (end.get(step, (0, None))[1] for end in ends)
            found.append(Evaluation(step, 1, stamp / 1000, metric, value, int(samples), low, high, protocol))
    return found


def _newest(points: Points | None) -> dict[int, tuple[int, float]]:
    """step -> (stamp, value) of its newest point."""
    if points is None:
        return {}
    found: dict[int, tuple[int, float]] = {}
    for step, stamp, value in zip(*(part.tolist() for part in points), strict=True):
        if step not in found or stamp >= found[step][0]:
            found[step] = stamp, value
    return found


def _grids(client: Any, run_id: str, problems: list[str]) -> dict[int, Callable[[], bytes]]:
    """Only those that the page shows are fetched, when it asks."""
    try:
        paths = [entry.path for entry in client.list_artifacts(run_id, "samples") if entry.path.endswith(".png")]
    except Exception as error:  # the numbers are worth a report without pictures
        problems.append(f"sample grids cannot be read ({redacted(reason(error))})")
        return {}
    steps = {Path(path).stem.removeprefix("step_"): path for path in paths}
    return {int(step): partial(_fetch, client, run_id, path) for step, path in sorted(steps.items()) if step.isdigit()}


def _fetch(client: Any, run_id: str, path: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_bytes()
