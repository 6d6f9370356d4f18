"""`repa-scale compare`: a REPA run against its baseline, from what MLflow holds (docs/comparison.md)."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from repa_scale.errors import ConfigError, DataError, ExitCode, require

EXAMPLE = "repa-scale compare --uri sqlite:///mlflow.db --experiment repa_scale --out report"

DEFAULT_URI = "sqlite:///mlflow.db"


def main(argv: list[str]) -> int:
    """Writes OUT/index.html, OUT/compare.json and, where both runs have a sample grid, OUT/samples.png."""
    from repa_scale.compare.numbers import comparison
    from repa_scale.compare.page import newest_grids, page, sentence
    from repa_scale.compare.read import find_pair, open_store, read_run
    from repa_scale.redact import redacted

    args = _parse(argv)
    require("plotly", "eval")
    uri = args.uri or _uri_of(args.runs or [])
    client = open_store(uri)
    ids = map(_run_id, args.runs) if args.runs else find_pair(client, args.experiment, args.pair)
    first, second = (read_run(client, run_id) for run_id in ids)
    repa, baseline = (second, first) if first.method == "baseline" else (first, second)
    experiment = None if args.runs else args.experiment
    result = {"uri": redacted(uri), "experiment": experiment, **comparison(repa, baseline)}
    runs = {"repa": repa, "baseline": baseline}
    text = page(result, runs)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "index.html").write_text(text, encoding="utf-8")
        _save_grids(out / "samples.png", newest_grids(runs), result)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    print(f"{sentence(result)}\nreport: {out / 'index.html'}")
    return ExitCode.COMPLETED


def _save_grids(path: Path, grids: dict[str, tuple[int, bytes]], result: dict[str, Any]) -> None:
    """The grids of both runs side by side; nothing where one has none."""
    path.unlink(missing_ok=True)
    if len(grids) < 2:
        return
    from repa_scale.pictures import beside, save

    pages = [Image.open(io.BytesIO(png)) for _, png in grids.values()]
    save(beside(pages, [f"{result['runs'][key]['label']}, step {step}" for key, (step, _) in grids.items()]), path)


def _run_id(given: str) -> str:
    """A run id, or a run folder that says which one is its own."""
    return _cursor(given)["run_id"] if Path(given).is_dir() else given


def _uri_of(runs: list[str]) -> str:
    """The store that the run folders among `runs` were tracked in; without any, the default of tracking.uri."""
    uris = {given: _cursor(given)["uri"] for given in runs if Path(given).is_dir()}
    if len(set(uris.values())) > 1:
        lines = ", ".join(f"{given} in {uri}" for given, uri in uris.items())
        raise DataError(
            f"--runs {' '.join(runs)} were tracked in different stores ({lines}); compare runs of one store"
        )
    return next(iter(uris.values()), DEFAULT_URI)


def _cursor(folder: str) -> dict[str, str]:
    file = Path(folder) / "mlflow.json"
    try:
        found = json.loads(file.read_text())
        return {key: found[key] for key in ("run_id", "uri")}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"--runs {folder}: {file} does not say which MLflow run it is; was tracking off?") from None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="repa-scale compare", description=__doc__, epilog=f"example: {EXAMPLE}")
    store = f"the runs' tracking.uri (default: that of the run folders given, or {DEFAULT_URI})"
    parser.add_argument("--uri", default="", help=store)
    parser.add_argument("--experiment", default="repa_scale", help="default: %(default)s")
    parser.add_argument("--pair", default="", help="pair id; default: the newest pair of the experiment")
    parser.add_argument("--runs", nargs=2, metavar=("REPA", "BASELINE"), help="two run ids or run folders instead")
    parser.add_argument("--out", default="report", help="folder to write (default: %(default)s)")
    return parser.parse_args(argv)
