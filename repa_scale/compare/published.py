"""Published points of SiT and REPA on ImageNet 256, as data, for `--against published`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from repa_scale.compare.groups import Groups
from repa_scale.compare.quality import Metric, curve_of

SETTING = "ImageNet 256, batch 256, FID of 50,000 samples"
SOURCE = "REPA (arXiv 2410.06940) and its project page; SiT (arXiv 2401.08740)"


@dataclass(frozen=True)
class Point:
    """A published FID. steps: optimiser steps at batch 256; guided: with classifier-free guidance."""

    model: str
    method: str
    steps: int
    fid: float
    sampler: str = "sde, 250 steps"
    guided: str = ""


POINTS = (
    Point("SiT-B/2", "baseline", 400_000, 33.0),
    Point("SiT-B/2", "repa", 400_000, 24.4),
    Point("SiT-L/2", "baseline", 400_000, 18.8),
    Point("SiT-L/2", "repa", 400_000, 9.7),
    Point("SiT-XL/2", "baseline", 7_000_000, 8.3),
    Point("SiT-XL/2", "baseline", 7_000_000, 9.5, "ode"),
    Point("SiT-XL/2", "repa", 400_000, 7.9),
    Point("SiT-XL/2", "repa", 1_000_000, 6.4),
    Point("SiT-XL/2", "repa", 4_000_000, 5.9),
    Point("SiT-XL/2", "baseline", 7_000_000, 2.06, guided="guided"),
    Point("SiT-XL/2", "repa", 1_000_000, 1.96, guided="guided"),
    Point("SiT-XL/2", "repa", 4_000_000, 1.80, guided="guided"),
    Point("SiT-XL/2", "repa", 4_000_000, 1.42, guided="guided, with a guidance interval"),
)


def beside_ours(groups: Groups, metrics: dict[str, Metric]) -> dict[str, Any]:
    """The published points of the runs' model, and our FID at the same step where we have one.

    Only FID of 50,000 samples can stand beside them; `why` says what is missing.
    """
    run = next(iter(groups.runs.values()))
    model = run.config.model.name
    points = [asdict(point) for point in POINTS if point.model == model]
    fid = next((metric for metric in metrics.values() if metric.name == "fid_n50000"), None)
    why = ""
    if not points:
        why = f"nothing is published of {model} (there is of SiT-B/2, SiT-L/2 and SiT-XL/2)"
    elif run.config.data.image_size != 256:
        why = f"the published points are of 256 pixels, these runs of {run.config.data.image_size}"
    elif fid is None:
        why = "the runs have no FID of 50,000 samples (repa-scale evaluate SAMPLES --extractor inception --run RUN)"
    for point in points:
        point["ours"] = None if why else _nearest(groups, fid, point)
    return {"setting": SETTING, "source": SOURCE, "points": points, "why": why}


def _nearest(groups: Groups, fid: Metric, point: dict[str, Any]) -> dict[str, Any] | None:
    """Our mean FID at the published step itself: nothing between two evaluations is made up."""
    for variant in groups.variants.values():
        run, rows = next((run, fid.evaluated[key]) for key, run in variant.runs.items())
        guided = any(float(one.protocol.get("guidance", 1.0)) != 1.0 for one in rows)
        if run.method != point["method"] or guided != bool(point["guided"]):
            continue
        curve = curve_of(variant, fid)
        if curve is not None and point["steps"] in curve.steps:
            values = curve.values[:, list(curve.steps).index(point["steps"])]
            return {"variant": variant.key, "fid": float(values.mean()), "seeds": len(values)}
    return None
