"""`repa-scale compare`: REPA runs against their baseline, from MLflow or run folders (docs/comparison.md)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from repa_scale.errors import ConfigError, DataError, ExitCode, did_you_mean, require

EXAMPLE = "repa-scale compare --uri sqlite:///mlflow.db --experiment repa_scale --out report"

DEFAULT_URI = "sqlite:///mlflow.db"


def main(argv: list[str]) -> int:
    """Writes OUT/index.html, OUT/compare.json, OUT/headline.png and, where runs have sample grids, OUT/samples.png."""
    from repa_scale.compare.groups import group
    from repa_scale.compare.numbers import comparison
    from repa_scale.compare.output import log_report, write_report
    from repa_scale.redact import redacted

    args = _parse(argv)
    require("plotly", "eval")
    allowed = tuple(args.allow)
    uri = args.uri or _uri_of(args.runs or [])
    runs = _read(uri, args)
    _check_models(runs, allowed)
    groups = group(runs, allowed)
    _check_allowed(groups.runs, allowed)
    experiment = None if args.runs else args.experiment
    result = comparison(groups, redacted(uri), experiment, allowed, args.metric, args.against == "published")
    out = Path(args.out)
    try:
        write_report(out, result, groups)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    print(f"{result['headline']}\nreport: {out / 'index.html'}")
    if args.log:
        print(f"MLflow: run {log_report(uri, args.experiment, out, result)} of experiment {args.experiment}")
    return ExitCode.COMPLETED


def _read(uri: str, args: argparse.Namespace) -> list[Any]:
    """The runs asked for; a store is opened only where one is needed."""
    from repa_scale.compare.read_folder import read_folder

    if args.runs and all(Path(one).is_dir() for one in args.runs):
        return [read_folder(Path(one)) for one in args.runs]
    from repa_scale.compare.read_mlflow import find_group, open_store, read_run

    client = open_store(uri)
    if not args.runs:
        return [read_run(client, run_id) for run_id in find_group(client, args.experiment, args.pair)]
    return [read_folder(Path(one)) if Path(one).is_dir() else read_run(client, one) for one in args.runs]


def _check_models(runs: list[Any], allowed: tuple[str, ...]) -> None:
    models = {run.config.model.name: run for run in runs}
    if len(models) > 1 and "model.name" not in allowed:
        shown = ", ".join(f"{name} ({run.name})" for name, run in models.items())
        raise DataError(f"the runs are of different models: {shown}; compare runs of one, or add --allow model.name")


def _check_allowed(runs: dict[str, Any], allowed: tuple[str, ...]) -> None:
    """A misspelt key would silently allow nothing."""
    from repa_scale.compare.validity import EVALUATOR, SPEED_KEYS, SPEED_TAGS, protected

    protocols = {key for run in runs.values() for one in run.evaluations for key in one.protocol}
    known = [*protected(runs), *SPEED_TAGS, *SPEED_KEYS, *(EVALUATOR + key for key in protocols)]
    for key in allowed:
        if key not in known:
            raise ConfigError(f"--allow {key} is not a setting that runs are held to{did_you_mean(key, known)}")


def _uri_of(runs: list[str]) -> str:
    """The store that the run folders among `runs` were tracked in, if it is one; else the default of tracking.uri."""
    uris = set()
    for one in runs:
        try:
            uris.add(json.loads((Path(one) / "mlflow.json").read_text())["uri"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return uris.pop() if len(uris) == 1 else DEFAULT_URI


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="repa-scale compare", description=__doc__, epilog=f"example: {EXAMPLE}")
    store = f"the runs' tracking.uri (default: that of the run folders given, or {DEFAULT_URI})"
    parser.add_argument("--uri", default="", help=store)
    parser.add_argument("--experiment", default="repa_scale", help="default: %(default)s")
    parser.add_argument("--pair", default="", help="pair id; default: the newest of the experiment with both methods")
    parser.add_argument(
        "--runs", nargs="+", metavar="RUN", help="run folders or run ids instead: any number, methods and seeds"
    )
    parser.add_argument("--metric", default="", help="of the headline, such as fid (default: the best there is)")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="KEY", help="a protected setting that may differ; repeatable"
    )
    parser.add_argument("--against", choices=("published",), help="published points of the same model beside ours")
    parser.add_argument("--out", default="report", help="folder to write (default: %(default)s)")
    parser.add_argument("--log", action="store_true", help="the report into the MLflow experiment, as a run of its own")
    return parser.parse_args(argv)
