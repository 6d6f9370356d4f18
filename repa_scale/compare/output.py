"""Where a comparison goes: the report's folder, and MLflow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from repa_scale.compare.groups import Groups
from repa_scale.compare.page import page
from repa_scale.compare.picture import headline_picture
from repa_scale.compare.run_data import RunData
from repa_scale.errors import DataError, reason, require
from repa_scale.pictures import beside, save
from repa_scale.redact import redacted

GRIDS = 4  # of samples.png; the page has all


def write_report(out: Path, result: dict[str, Any], groups: Groups) -> None:
    """index.html, compare.json, headline.png, samples.png. Raises OSError where the folder cannot be written."""
    grids, problems = newest_grids(groups.runs)
    result["warnings"] += problems
    text = page(result, grids)
    out.mkdir(parents=True, exist_ok=True)
    # A line a part: indenting them all would take longer than all the rest where there are many runs.
    parts = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    (out / "compare.json").write_text(f"{{\n{parts}\n}}\n")
    (out / "index.html").write_text(text, encoding="utf-8")
    for name, picture in (("headline.png", headline_picture(result)), ("samples.png", _samples(grids, result))):
        (out / name).unlink(missing_ok=True)
        if picture is not None:
            save(picture, out / name)


def log_report(uri: str, experiment: str, out: Path, result: dict[str, Any]) -> str:
    """The report's files as artefacts of a run named `comparison`, with the headline as a tag; its run id.

    Raises:
        DataError: the store cannot be reached, or takes nothing.
    """
    require("mlflow", "track")
    from repa_scale.tracking import mlflow_client

    try:
        client = mlflow_client(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise DataError(f"--log: experiment {experiment} is not in {redacted(uri)}; name it with --experiment")
        # No tag `pair_id`: the next comparison must not take the report for a run.
        tags = {"repa_scale.comparison": "1", "headline": result["headline"][:5000]}
        tags["runs"] = ", ".join(run["run_id"] for run in result["runs"].values())[:5000]
        run_id = client.create_run(found.experiment_id, run_name="comparison", tags=tags).info.run_id
        for axis, value in _ratios(result).items():
            client.log_metric(run_id, axis, value)
        for name in ("index.html", "compare.json", "headline.png", "samples.png"):
            if (out / name).exists():
                client.log_artifact(run_id, str(out / name))
        client.set_terminated(run_id, "FINISHED")
    except DataError:
        raise
    except Exception as error:  # of MLflow, SQLAlchemy, requests
        raise DataError(
            f"--log: {redacted(uri)} did not take the report ({redacted(reason(error))}); try again"
        ) from None
    return run_id


def newest_grids(runs: dict[str, RunData]) -> tuple[dict[str, tuple[int, bytes]], list[str]]:
    """(step, PNG) of each run that has a sample grid: at the newest step that all of them have, else each its newest;
    and what could not be read."""
    with_grids = {key: run.grids for key, run in runs.items() if run.grids}
    common = set.intersection(*map(set, with_grids.values())) if with_grids else set()
    found, problems = {}, []
    for key, by_step in with_grids.items():
        step = max(common or by_step)
        try:
            found[key] = step, by_step[step]()
        except Exception as error:  # of MLflow's stores of artefacts; the numbers are worth a report without pictures
            problems.append(f"{key}: sample grids cannot be read ({redacted(reason(error))})")
    return found, problems


def _ratios(result: dict[str, Any]) -> dict[str, float]:
    """Metrics of the run `comparison`: the headline's ratio by variant and axis."""
    metric = result["metrics"].get(result["verdict"]["metric"] or "")
    found = {}
    for variant, rows in (metric["targets"] if metric else {}).items():
        for axis, one in rows[0]["axes"].items():
            if one["ratio"] is not None and one["kind"] == "exact":
                found[f"speed_up/{variant}/{axis}"] = one["ratio"]
    return found


def _samples(grids: dict[str, tuple[int, bytes]], result: dict[str, Any]) -> Image.Image | None:
    """The grids of the runs side by side; None where fewer than two have one."""
    shown = list(grids.items())[:GRIDS]
    if result["baseline"] in result["variants"] and len(grids) > GRIDS:  # the last of the runs are the baseline's
        shown = [*shown[: GRIDS // 2], *list(grids.items())[-GRIDS // 2 :]]
    if len(shown) < 2:
        return None
    pages = [Image.open(io.BytesIO(png)) for _, (_, png) in shown]
    return beside(pages, [f"{result['runs'][key]['label']}, step {step}" for key, (step, _) in shown])
