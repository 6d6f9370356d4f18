"""`repa-scale compare`: a REPA run against its baseline, from what MLflow holds (docs/comparison.md)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from repa_scale.errors import ConfigError, DataError, ExitCode

EXAMPLE = "repa-scale compare --uri sqlite:///mlflow.db --experiment repa_scale --out report"


def main(argv: list[str]) -> int:
    """Writes OUT/index.html and OUT/compare.json."""
    from repa_scale.compare.numbers import comparison
    from repa_scale.compare.page import page, sentence
    from repa_scale.compare.read import find_pair, open_store, read_run

    args = _parse(argv)
    client = open_store(args.uri)
    ids = args.runs or find_pair(client, args.experiment, args.pair)
    first, second = (read_run(client, run_id) for run_id in map(_run_id, ids))
    repa, baseline = (second, first) if first.method == "baseline" else (first, second)
    result = {"uri": args.uri, "experiment": args.experiment, **comparison(repa, baseline)}
    text = page(result, {"repa": repa, "baseline": baseline})
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "index.html").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    print(f"{sentence(result)}\nreport: {out / 'index.html'}")
    return ExitCode.COMPLETED


def _run_id(given: str) -> str:
    """A run id, or a run folder that says which one is its own."""
    file = Path(given) / "mlflow.json"
    if not Path(given).is_dir():
        return given
    try:
        return json.loads(file.read_text())["run_id"]
    except (OSError, ValueError, KeyError):
        raise DataError(f"--runs {given}: {file} does not say which MLflow run it is; was tracking off?") from None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="repa-scale compare", description=__doc__, epilog=f"example: {EXAMPLE}")
    parser.add_argument("--uri", default="sqlite:///mlflow.db", help="the runs' tracking.uri (default: %(default)s)")
    parser.add_argument("--experiment", default="repa_scale", help="default: %(default)s")
    parser.add_argument("--pair", default="", help="pair id; default: the newest pair of the experiment")
    parser.add_argument("--runs", nargs=2, metavar=("REPA", "BASELINE"), help="two run ids or run folders instead")
    parser.add_argument("--out", default="report", help="folder to write (default: %(default)s)")
    return parser.parse_args(argv)
