"""A run as its folder has it: configuration, rows, evaluations, pictures, incidents. No MLflow."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from repa_scale import evaluations
from repa_scale.compare.run_data import FINISHED, RUNNING, SETTINGS, History, Rows, RunData, configuration, identity_of
from repa_scale.errors import DataError, require
from repa_scale.evaluations import Evaluation
from repa_scale.run_folder import read_incidents, read_metrics, read_status
from repa_scale.tracking import flatten, numbers

ALIVE_SECONDS = 60.0  # docs/run_folder.md: an older heartbeat is a dead run's
STATES = {"completed": FINISHED, "preempted": "KILLED", "failed": "FAILED", "diverged": "FAILED"}


def is_run(folder: Path) -> bool:
    return (folder / SETTINGS).is_file()


def read_folder(folder: Path) -> RunData:
    """All that is compared of a run.

    Raises:
        DataError: no run lies there, it is damaged, or it has logged nothing yet.
    """
    if not is_run(folder):
        raise DataError(f"--runs {folder} holds no {SETTINGS}, so it is no run folder; give run.dir of a run")
    yaml = require("yaml", "eval")
    try:
        params = {key: str(value) for key, value in flatten(yaml.safe_load((folder / SETTINGS).read_text())).items()}
        params |= {"alignment_kernel": params.pop("alignment.kernel")} if "alignment.kernel" in params else {}
        config = configuration(params)
        keys = json.loads((folder / "identity.json").read_text())
        fingerprint = keys["keys"]["data.fingerprint"]
        metrics = read_metrics(folder)
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        what = "no metrics yet; wait for its first logged step" if missing == "metrics.jsonl" else f"no {missing}"
        raise DataError(f"--runs {folder}: the run has {what}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"--runs {folder} is damaged ({error!r:.120}); leave it out") from None
    if not metrics:
        raise DataError(f"--runs {folder}: the run has no metrics yet; wait for its first logged step")
    rows, history = _histories(metrics)
    problems: list[str] = []
    status = _status(read_status(folder))
    tags = {
        "method": config.method,
        "model": config.model.name,
        "precision": config.train.precision,
        "seed": str(config.seed),
        "data_fingerprint": fingerprint,
        "pair_id": str(keys.get("pair_id", "")),
        "identity_hash": str(keys.get("identity_hash", "")),
        "run_dir": str(folder.absolute()),
        **_tags(folder),
    }
    return RunData(
        run_id=str(folder),
        name=folder.name,
        status=status,
        source=str(folder),
        params=params,
        tags=tags,
        rows=rows,
        history=history,
        grids=_grids(folder),
        evaluations=evaluations.read(folder),
        representation=read_representation(folder, problems),
        incidents=read_incidents(folder),
        problems=problems,
        config=config,
        identity=identity_of(config, fingerprint),
    )


def besides(folder: Path, run_id: str) -> tuple[list[Evaluation], list[dict[str, Any]], list[dict[str, Any]]] | None:
    """What MLflow may lack of the run that `folder` mirrors to it: evaluations made later, representation, incidents.

    None where the folder is not here, or mirrors another run.
    """
    try:
        mirrored = json.loads((folder / "mlflow.json").read_text())["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if mirrored != run_id:
        return None
    return evaluations.read(folder), read_representation(folder, []), read_incidents(folder)


def read_representation(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    """RUN/representation/step_N.json, in the order of the steps; those of the raw weights are left out."""
    found = []
    for file in (folder / "representation").glob("step_*[0-9].json"):
        try:
            one = json.loads(file.read_text())
            found.append((int(one["step"]), one))
        except (OSError, ValueError, KeyError, TypeError):
            problems.append(f"{file.name} of representation/ cannot be read")
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _histories(metrics: list[dict[str, Any]]) -> tuple[Rows, dict[str, History]]:
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for row in metrics:
        for key, value in numbers(row).items():
            steps.setdefault(key, []).append(row["step"])
            values.setdefault(key, []).append(value)
    rows = Rows(*(np.array([row.get(key, 1) for row in metrics]) for key in ("step", "time", "attempt")))
    return rows, {key: History(np.array(steps[key], np.int64), np.array(values[key])) for key in steps}


def _status(found: dict[str, Any]) -> str:
    if found.get("state") == "running":
        alive = time.time() - float(found.get("updated", 0)) < ALIVE_SECONDS
        return RUNNING if alive else "FAILED"
    return STATES.get(str(found.get("state")), "UNKNOWN")


def _tags(folder: Path) -> dict[str, str]:
    """Of the newest start; of a run that wrote none, what its newest checkpoint says."""
    try:
        return {key: str(value) for key, value in json.loads((folder / "tags.json").read_text()).items()}
    except (OSError, ValueError, AttributeError):
        pass
    for file in sorted((folder / "checkpoints").glob("step_*/manifest.json"), reverse=True):
        try:
            manifest = json.loads(file.read_text())
            return {key: str(manifest[key]) for key in ("world_size", "zero_stage", "versions") if key in manifest}
        except (OSError, ValueError):
            continue
    return {}


def _grids(folder: Path) -> dict[int, Callable[[], bytes]]:
    files = {file.stem.removeprefix("step_"): file for file in (folder / "samples").glob("step_*.png")}
    return {int(step): file.read_bytes for step, file in sorted(files.items()) if step.isdigit()}
