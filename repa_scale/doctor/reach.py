"""Checks of what a node must reach: MLflow, the data set, the weights."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

from repa_scale.config import Config, from_dict
from repa_scale.doctor.finding import FAIL, NOTE, OK, WARN, Finding, Look
from repa_scale.doctor.machine import existing
from repa_scale.errors import UserError
from repa_scale.redact import redacted

PATIENCE = 5.0  # seconds for a server's answer


def mlflow(look: Look) -> list[Finding]:
    """The tracking store, from the node of rank 0, which alone writes to it."""
    if look.config is None or not look.first:
        return []
    uri = look.config["tracking"]["uri"]
    if uri == "none":
        return [Finding("mlflow", NOTE, "off (tracking.uri=none)")]
    if uri.startswith(("http://", "https://")):
        return [_server(uri)]
    path = Path(uri.removeprefix("sqlite:///").removeprefix("file://"))
    folder = existing(path.absolute().parent)
    try:
        probe = folder / ".repa-scale-doctor"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return [
            Finding(
                "mlflow",
                FAIL,
                f"{redacted(uri)}: {folder} cannot be written: {error.strerror}",
                "choose another tracking.uri",
            )
        ]
    return [Finding("mlflow", OK, f"{redacted(uri)}: its folder can be written")]


def _server(uri: str) -> Finding:
    shown = redacted(uri)
    remedy = (
        "start the server, open its port to this node, or tracking.uri=none; a run without it goes on and sends later"
    )
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=PATIENCE) as answer:
            return Finding("mlflow", OK, f"{shown} answers {answer.status}")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return Finding("mlflow", OK, f"{shown} answers, and asks for a log-in")
        return Finding("mlflow", WARN, f"{shown} answers {error.code}", remedy)
    except (OSError, ValueError) as error:
        return Finding("mlflow", FAIL, f"{shown} does not answer: {getattr(error, 'reason', error)}", remedy)


def data(look: Look) -> list[Finding]:
    """The prepared set, opened as training opens it; its fingerprint is compared between the nodes."""
    from repa_scale.data.dataset import check_dataset, open_configured

    config = configured(look)
    if config is None:
        return []
    if not (config.data.path or config.data.remote):
        return [Finding("data", NOTE, "no data.path or data.remote was given")]
    try:
        dataset = open_configured(config.data)
        check_dataset(dataset, config.model.num_classes, config.data.image_size, config.train.global_batch)
    except UserError as error:
        return [Finding("data", FAIL, str(error), "mount the set on this node, or mend data.path or data.remote")]
    shards = dataset.reader.shards
    if not config.data.remote:
        absent = [shard.basename for shard in shards if not (dataset.path / shard.basename).is_file()]
        if absent:
            return [
                Finding(
                    "data",
                    FAIL,
                    f"{len(absent)} of {len(shards)} shards are absent, such as {absent[0]}",
                    "copy the set again",
                )
            ]
    return [
        Finding("data", OK, f"{dataset.count:,} images in {len(shards)} shards, fingerprint {dataset.fingerprint[:12]}")
    ]


def weights(look: Look) -> list[Finding]:
    """Weights of the hub: in this node's cache and whole; with `look.fetch` brought there."""
    from repa_scale import weights as hub

    config = configured(look)
    if config is None:
        return []
    findings = []
    files = hub.needed(config)
    for file in files:
        try:
            have = hub.cached(file)
            if look.fetch:
                path = hub.fetch(file)
                words = "was here" if have == path else "fetched"
                findings.append(
                    Finding(
                        "weights", OK, f"{file} {words}, {path.resolve().name[:12]}, {path.stat().st_size / 1e6:.0f} MB"
                    )
                )
            elif have is None:
                findings.append(
                    Finding(
                        "weights",
                        WARN,
                        f"{file} is not in the cache",
                        "repa-scale doctor --fetch with the same arguments",
                    )
                )
            elif not hub.intact(have):
                findings.append(
                    Finding(
                        "weights",
                        FAIL,
                        f"{file} is damaged: its hash is not {have.resolve().name[:12]}",
                        "repa-scale doctor --fetch with the same arguments",
                    )
                )
            else:
                findings.append(Finding("weights", OK, f"{file}, {have.resolve().name[:12]}"))
        except UserError as error:
            findings.append(Finding("weights", FAIL, str(error), "see docs/encoders.md, Without a network"))
    return findings or [Finding("weights", NOTE, "none from a hub")]


def configured(look: Look) -> Config | None:
    return None if look.config is None else from_dict(look.config)
