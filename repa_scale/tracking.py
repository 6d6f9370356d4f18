"""Mirrors a run to MLflow from a thread of its own. The only room that writes to MLflow.

What is sent is read back from the run folder: metrics.jsonl and evaluations.jsonl from the byte where the last sending
ended, and pictures.
So a server that is away costs training nothing, and what it missed is sent later or by the next start. Sending twice is
harmless: MLflow keeps equal points once.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from repa_scale import evaluations
from repa_scale.config import Config
from repa_scale.errors import UserError, reason
from repa_scale.files import write_atomically
from repa_scale.redact import redacted
from repa_scale.run_folder import read_status

STATUS = {"completed": "FINISHED", "preempted": "KILLED", "failed": "FAILED", "diverged": "FAILED"}
CURSOR = "mlflow.json"
RETRY_SECONDS = (2.0, 60.0)  # first and longest wait after a failure
FINISH_SECONDS = 30.0  # how long the end of a run waits for the last sending
POINTS = 900  # metrics in one call; MLflow takes 1000
CLIENT_VARIABLES = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
NOT_METRICS = ("step", "time")

log = logging.getLogger("repa_scale")


class Tracker:
    """Tracking that is off."""

    def log(self, step: int, metrics: dict[str, float], time: float) -> None:
        """A row was written to metrics.jsonl. Returns at once."""

    def log_artifact(self, path: Path, folder: str) -> None:
        """A file of the run is to be seen in MLflow under `folder`. Returns at once."""

    def finish(self, state: str) -> None:
        """Sends what is left, for at most FINISH_SECONDS, and closes the MLflow run as `state` of status.json."""


class Trackers(Tracker):
    """Several, each told the same."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, step: int, metrics: dict[str, float], time: float) -> None:
        for tracker in self.trackers:
            tracker.log(step, metrics, time)

    def log_artifact(self, path: Path, folder: str) -> None:
        for tracker in self.trackers:
            tracker.log_artifact(path, folder)

    def finish(self, state: str) -> None:
        for tracker in self.trackers:
            tracker.finish(state)


def check_installed(config: Config) -> None:
    """Raises `UserError` where what `tracking` asks for is not installed; every rank finds the same."""
    if config.tracking.uri not in ("", "none") and importlib.util.find_spec("mlflow") is None:
        raise UserError(
            "mlflow is not installed; install it with: pip install 'repa-scale[track]', or tracking.uri=none"
        )
    if config.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tensorboard is not installed; install it with: pip install 'repa-scale[tensorboard]', "
            "or tracking.tensorboard=false"
        )


def open_tracker(config: Config, run_dir: Path, tags: dict[str, str], dataset: Any) -> Tracker:
    """The tracker that `tracking.uri` and `tracking.tensorboard` ask for. Reaching a server is left to a thread.

    Args:
        tags: of the MLflow run.
        dataset: repa_scale.data.dataset.DataSet, for the dataset input.
    """
    mlflow = _open_mlflow(config, run_dir, tags, dataset)
    if not config.tracking.tensorboard:
        return mlflow
    from repa_scale.tensorboard_sink import TensorBoardTracker

    return Trackers([mlflow, TensorBoardTracker(run_dir)])


def _open_mlflow(config: Config, run_dir: Path, tags: dict[str, str], dataset: Any) -> Tracker:
    if config.tracking.uri in ("", "none"):
        return Tracker()
    return MlflowTracker(config, run_dir, tags, dataset)


class MlflowTracker(Tracker):
    """See the head of this file."""

    def __init__(self, config: Config, run_dir: Path, tags: dict[str, str], dataset: Any) -> None:
        self.config, self.run_dir, self.tags, self.dataset = config, run_dir, tags, dataset
        self.uri = redacted(config.tracking.uri)  # the one that is shown and stored
        self._start_id = uuid.uuid4().hex
        self._artifacts: list[tuple[Path, str]] = [(run_dir / "config.yaml", "")]
        self._artifacts += [(path, "samples") for path in sorted((run_dir / "samples").glob("*.png"))]
        self._cursor: dict[str, Any] = {}
        self._client: Any = None
        self._wake, self._ending, self._drained = threading.Event(), threading.Event(), threading.Event()
        self._final: str | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._send_for_ever, name="tracking", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float], time: float) -> None:
        self._wake.set()

    def log_artifact(self, path: Path, folder: str) -> None:
        self._artifacts.append((path, folder))
        self._wake.set()

    def finish(self, state: str) -> None:
        self._final = state
        self._ending.set()
        self._wake.set()
        if not self._drained.wait(FINISH_SECONDS):
            rows, files = self._unsent()
            log.warning(
                "tracking: %s did not take everything in %.0f s: %d rows and %d files are not sent; nothing is lost: "
                "%s holds them, and the next start of this run sends them",
                self.uri,
                FINISH_SECONDS,
                rows,
                files,
                self.run_dir,
            )

    def _unsent(self) -> tuple[int, int]:
        """Rows of metrics.jsonl and evaluations.jsonl, and files, that the store has not taken."""
        rows = 0
        for name, cursor in (("metrics.jsonl", "sent_bytes"), (evaluations.FILE, "sent_evaluation_bytes")):
            with suppress(OSError):
                rows += (self.run_dir / name).read_bytes()[self._cursor.get(cursor, 0) :].count(b"\n")
        return rows, len(self._artifacts)

    # Below: the thread.

    def _send_for_ever(self) -> None:
        pause = RETRY_SECONDS[0]
        while not self._drained.is_set():
            # In this order: what is written from here on wakes the thread again, and a run is closed only after a
            # sending that began when its last row was there.
            self._wake.clear()
            final = self._final
            try:
                if self._client is None:
                    self._client = self._connect()
                self._send_rows("metrics.jsonl", "sent_bytes", _of_metrics)
                self._send_rows(evaluations.FILE, "sent_evaluation_bytes", _of_evaluation)
                if final is not None:  # before the files: a store that refuses them still learns how the run ended
                    self._client.set_terminated(self._cursor["run_id"], STATUS.get(final, "FAILED"))
                self._send_artifacts()
                if self._warned and pause != RETRY_SECONDS[0]:
                    log.info("tracking: %s has all rows again", self.uri)
                if final is not None:
                    self._drained.set()
                    return
                pause = RETRY_SECONDS[0]
                self._wake.wait()
            except Exception as error:  # MLflow, requests and SQLAlchemy raise many kinds; none may reach training
                if not self._warned:
                    self._warned = True
                    log.warning(
                        "tracking: %s: %s; training goes on, and sends it later", self.uri, redacted(reason(error))
                    )
                if self._ending.is_set():
                    pause = RETRY_SECONDS[0]
                    time.sleep(pause)
                else:
                    self._ending.wait(pause)
                pause = min(2 * pause, RETRY_SECONDS[1])

    def _connect(self) -> Any:
        """Opens the store and the run: the one in RUN/mlflow.json if the store has it, else a new one."""
        client = mlflow_client(self.config.tracking.uri)
        self._cursor = self._read_cursor(client) or self._create_run(client)
        self._describe(client)
        return client

    def _read_cursor(self, client: Any) -> dict[str, Any] | None:
        from mlflow.exceptions import MlflowException

        try:
            cursor = json.loads((self.run_dir / CURSOR).read_text())
            if cursor["uri"] != self.uri:
                return None
            cursor["sent_bytes"], cursor["sent_files"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        try:
            if client.get_run(cursor["run_id"]).info.lifecycle_stage == "deleted":
                return None
            client.update_run(cursor["run_id"], status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return cursor

    def _create_run(self, client: Any) -> dict[str, Any]:
        name = self.config.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            raise UserError(f"tracking.experiment={name} is deleted; restore it, or name another")
        identifier = (
            experiment.experiment_id if experiment else client.create_experiment(name, _artifacts_of(self.config))
        )
        # A server that creates the run and fails to say so is asked again: the tag finds what the first call made.
        made = client.search_runs([identifier], f"tags.start_id = '{self._start_id}'", max_results=1)
        label = f"{self.config.run.name}-seed{self.config.seed}"
        run = made[0] if made else client.create_run(identifier, run_name=label, tags={"start_id": self._start_id})
        cursor = {
            "uri": self.uri,
            "experiment_id": identifier,
            "run_id": run.info.run_id,
            "sent_bytes": 0,
            "sent_files": [],
        }
        self._save(cursor)
        return cursor

    def _describe(self, client: Any) -> None:
        """Parameters once, tags as they are now, and keys that a later start changed as tags `attempt_N.key`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        run_id = self._cursor["run_id"]
        known = client.get_run(run_id)
        ours = {_key(key): redacted(str(value))[:6000] for key, value in flatten(asdict(self.config)).items()}
        attempt = read_status(self.run_dir).get("attempt", 1)
        tags = dict(self.tags)
        tags |= {
            f"attempt_{attempt}.{key}": value
            for key, value in ours.items()
            if key in known.data.params and known.data.params[key] != value
        }
        params = [Param(key, value) for key, value in ours.items() if key not in known.data.params]
        for i in range(0, len(params), 100):
            client.log_batch(run_id, params=params[i : i + 100])
        client.log_batch(run_id, tags=[RunTag(key, redacted(str(value))[:5000]) for key, value in tags.items()])
        if not known.inputs or not known.inputs.dataset_inputs:
            data = self.dataset
            profile = {"images": data.count, "classes": len(data.class_names), "image_size": data.image_size}
            described = Dataset(
                name=data.name,
                digest=data.fingerprint[:32],
                source_type="local",
                source=json.dumps({"path": str(Path(data.path).absolute())}),
                profile=json.dumps(profile),
            )
            client.log_inputs(run_id, [DatasetInput(described, [InputTag("mlflow.data.context", "training")])])

    def _send_rows(self, name: str, cursor: str, described: Callable[[dict], Row]) -> None:
        """Rows of a file of the run folder that were not sent yet, with their own times, many in a call.

        Args:
            cursor: key of RUN/mlflow.json that holds how many bytes of the file were sent.
        """
        from mlflow.entities import Metric, RunTag

        file = self.run_dir / name
        if not file.exists():
            return
        sent = self._cursor.get(cursor, 0)
        if file.stat().st_size < sent:  # another file than the one that was sent
            sent = self._cursor[cursor] = 0
        points: list[Metric] = []
        tags: dict[str, str] = {}
        with file.open("rb") as stream:  # a line at a time: an outage of days is no matter of memory
            stream.seek(sent)
            for line in stream:
                if not line.endswith(b"\n"):  # half written
                    break
                sent += len(line)
                try:
                    row = described(json.loads(line))
                except (ValueError, KeyError, TypeError):  # torn by a full disk, say: readers of the file skip it too
                    continue
                stamp = int(row.time * 1000)
                points += [Metric(_key(key), value, stamp, row.step) for key, value in row.numbers.items()]
                tags |= row.tags
                if len(points) > POINTS - 100:
                    self._flush(points, [RunTag(*tag) for tag in tags.items()], cursor, sent)
                    points, tags = [], {}
        if sent != self._cursor.get(cursor, 0):
            self._flush(points, [RunTag(*tag) for tag in tags.items()], cursor, sent)

    def _flush(self, points: list, tags: list, cursor: str, sent: int) -> None:
        if points or tags:
            self._client.log_batch(self._cursor["run_id"], metrics=points, tags=tags)
        self._cursor[cursor] = sent
        self._save(self._cursor)

    def _send_artifacts(self) -> None:
        """Every file that is due; one that fails does not hold up the others, and is tried again."""
        failure: Exception | None = None
        for item in list(self._artifacts):
            path, folder = item
            try:
                key = f"{folder}/{path.name}:{path.stat().st_mtime_ns}" if path.exists() else None
                if key is not None and key not in self._cursor["sent_files"]:
                    self._client.log_artifact(self._cursor["run_id"], str(path), folder or None)
                    self._cursor["sent_files"].append(key)
                    self._save(self._cursor)
                self._artifacts.remove(item)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _save(self, cursor: dict[str, Any]) -> None:
        write_atomically(self.run_dir / CURSOR, json.dumps(cursor, indent=1))


class Row(NamedTuple):
    """What MLflow is told of one line of a file."""

    step: int
    time: float
    numbers: dict[str, float]
    tags: dict[str, str]


def _of_metrics(row: dict[str, Any]) -> Row:
    return Row(int(row["step"]), float(row["time"]), numbers(row), {})


def _of_evaluation(row: dict[str, Any]) -> Row:
    """The value and its interval as metrics, and how it was measured as a tag of the same name."""
    found = evaluations.Evaluation(**row)
    described = json.dumps({**found.protocol, "low": found.low, "high": found.high})
    return Row(found.step, found.time, found.points(), {_key(found.name): redacted(described)[:5000]})


def mlflow_client(uri: str) -> Any:
    """MLflow's client without its bars and messages. Each call tries once, for a few seconds: callers have a patience
    of their own. Who sets MLflow's variables is obeyed."""
    for variable, value in CLIENT_VARIABLES.items():
        os.environ.setdefault(variable, value)
    import mlflow

    for name in ("mlflow", "alembic"):  # after the import, which sets them anew
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow.MlflowClient(tracking_uri=uri)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What MLflow can draw of a row of metrics.jsonl: finite numbers (it would turn inf into 1.8e308)."""
    return {
        key: float(value)
        for key, value in row.items()
        if key not in NOT_METRICS and isinstance(value, (int, float)) and math.isfinite(value)
    }


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _key(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _artifacts_of(config: Config) -> str | None:
    """Of an SQLite file: beside it. MLflow's default would be ./mlruns of whoever made the experiment."""
    uri = config.tracking.uri
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
