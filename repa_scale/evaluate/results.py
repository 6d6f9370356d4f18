"""What becomes of measured values: a table, JSON beside the samples, lines of RUN/evaluations.jsonl; and which samples
they are of, by the samples' sidecar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from repa_scale import evaluations
from repa_scale.checksums import checksum_file
from repa_scale.errors import ConfigError, DataError
from repa_scale.evaluate.features import Features
from repa_scale.evaluate.image_sets import ImageSet
from repa_scale.extractors import Extractor
from repa_scale.files import write_atomically
from repa_scale.metrics.bootstrap import Estimate
from repa_scale.run_folder import run_of

SCHEMA = 1  # of the JSON (docs/evaluation.md)
SHOWN = {"inception_score": "IS", "fid": "FID", "sfid": "sFID"}
# Of the samples' sidecar: what must be equal for two values to be compared.
PROTOCOL = ("weights", "sampler", "steps", "guidance", "interval", "seed", "latents", "precision", "rounding", "path")


def read_sidecar(source: Path) -> dict[str, Any]:
    """What `repa-scale sample` wrote beside the samples; empty where there is nothing.

    Raises:
        DataError: it is damaged, or of other samples.
    """
    npz = source / "samples.npz" if source.is_dir() else source
    file = npz.with_suffix(".json")
    if npz.suffix != ".npz" or not file.is_file():
        return {}
    try:
        sidecar = json.loads(file.read_text())
        promised = sidecar.get("sha256")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{file} cannot be read ({error}); draw the samples again, or remove it") from None
    if promised and checksum_file(npz, "sha256") != f"sha256:{str(promised).removeprefix('sha256:')}":
        raise DataError(f"{npz} is not the file that {file.name} describes (sha256); draw the samples again")
    return sidecar


def find_run(asked: str | None, source: str) -> Path | None:
    """The run that values belong to: `--run`, or the one that `source` is or is a checkpoint of; None: neither is here.

    Args:
        source: the folder that the weights were read from; empty: not known.

    Raises:
        ConfigError: `--run` is no run folder.
    """
    if asked:
        if not (Path(asked) / "config.yaml").is_file():
            raise ConfigError(
                f"--run {asked} is not a run folder (it has no config.yaml); give the run.dir of a training run"
            )
        return Path(asked)
    folder = run_of(Path(source)) or Path(source)
    return folder if source and (folder / "config.yaml").is_file() else None


def result_file(source: Path) -> Path:
    """Where the JSON goes: beside the samples."""
    source = source / "samples.npz" if (source / "samples.npz").is_file() else source
    stem = source.stem if source.suffix == ".npz" else source.name
    return source.resolve().with_name(f"{stem}.evaluation.json")


def print_table(results: dict[str, Estimate], images: ImageSet, extractor: Extractor, reference: Features) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{images.name}: {images.count:,} samples against {reference.name}, by {extractor.name}")
    for column in ("metric", "value", "95 % interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, estimate in results.items():
        low, high = (_figure(name, value) for value in (estimate.low, estimate.high))
        table.add_row(SHOWN.get(name, name), _figure(name, estimate.value), f"{low} to {high}" if low else "")
    Console().print(table)


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.6f}" if name.startswith("kid") else f"{value:.4f}"


def protocol_of(extractor: Extractor, reference: Features, sidecar: dict[str, Any]) -> dict[str, Any]:
    return {
        "extractor": extractor.name,
        "extractor_fingerprint": extractor.fingerprint,
        "resize": extractor.spec.resize,
        "reference": reference.name,
        "reference_fingerprint": reference.fingerprint,
        "reference_count": reference.count or None,
        **{key: sidecar[key] for key in PROTOCOL if key in sidecar},
        **({"labels": sidecar["classes"]} if "classes" in sidecar else {}),
    }


def step_of(asked: int | None, sidecar: dict[str, Any]) -> int:
    step = asked if asked is not None else sidecar.get("step")
    if step is None:
        raise ConfigError(
            "--run needs the step of the samples' checkpoint, which no sidecar (samples.json) says; add --step"
        )
    return int(step)


def append(run: Path, results: dict[str, Estimate], count: int, protocol: dict[str, Any], step: int) -> None:
    try:
        attempt = int(json.loads((run / "status.json").read_text())["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        attempt = 1
    for name, estimate in results.items():
        evaluations.append(
            run,
            evaluations.Evaluation(
                step, attempt, time.time(), name, estimate.value, count, estimate.low, estimate.high, protocol
            ),
        )


def write_results(
    file: Path, images: ImageSet, results: dict[str, Estimate], protocol: dict[str, Any], sidecar: dict[str, Any]
) -> None:
    """The results; those of other extractors and references of the same samples stay."""
    samples = {"name": images.name, "count": images.count, "size": list(images.size), "step": sidecar.get("step")}
    if "sha256" in sidecar:
        samples["sha256"] = sidecar["sha256"]
    rows = [
        {
            "metric": name,
            "value": one.value,
            "low": one.low,
            "high": one.high,
            "count": images.count,
            "protocol": protocol,
        }
        for name, one in results.items()
    ]
    try:
        before = json.loads(file.read_text())
        if before["schema"] == SCHEMA and before["samples"] == samples and "sha256" in samples:
            mine = {(row["metric"], protocol["reference_fingerprint"]) for row in rows}
            kept = [
                row
                for row in before["results"]
                if (row["metric"], row["protocol"]["reference_fingerprint"]) not in mine
            ]
            rows = kept + rows
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        write_atomically(file, json.dumps({"schema": SCHEMA, "samples": samples, "results": rows}, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}); copy the samples to another folder") from None
