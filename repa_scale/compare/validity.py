"""What the runs have in common and where they differ, and which speed-ups that forbids. Pure functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from repa_scale.compare.groups import Groups, is_own
from repa_scale.compare.run_data import RUNNING, RunData
from repa_scale.evaluations import Evaluation
from repa_scale.identity import pair_id

QUALITY, TIMES = "quality", "times"
EVALUATOR = "evaluator."
# Tags and free keys on which the time of a step depends.
SPEED_TAGS = ("device", "world_size", "zero_stage")
SPEED_KEYS = (
    "train.compile", "train.micro_batch", "train.activation_checkpointing", "train.deterministic", "alignment_kernel",
)  # fmt: skip
# Of a protocol: the seed of the samples may follow the run's; what a machine names itself says nothing.
FREE_OF_PROTOCOL = ("seed", "low", "high", "device", "time")


@dataclass(frozen=True)
class Difference:
    """A setting that differs. values: by run. protects: QUALITY, TIMES, or the name of the metric whose evaluator it
    is of."""

    key: str
    values: dict[str, Any]
    protects: str
    allowed: bool = False


def protected(runs: dict[str, RunData]) -> list[str]:
    """Identity keys that must be equal: all but method, seed and alignment."""
    return sorted({key for run in runs.values() for key in run.identity if not is_own(key)})


def differences(runs: dict[str, RunData], allowed: tuple[str, ...] = ()) -> list[Difference]:
    """Protected settings that differ between the runs, and what the times depend on."""
    found = []
    for key in protected(runs):
        _compare(found, key, {name: run.identity.get(key) for name, run in runs.items()}, QUALITY, allowed)
    for key in SPEED_TAGS:
        _compare(found, key, {name: run.tags.get(key) for name, run in runs.items()}, TIMES, allowed)
    for key in SPEED_KEYS:
        _compare(found, key, {name: run.params.get(key) for name, run in runs.items()}, TIMES, allowed)
    return found


def evaluator_differences(
    metric: str, evaluated: dict[str, list[Evaluation]], allowed: tuple[str, ...] = ()
) -> list[Difference]:
    """Where the protocols of one metric differ between runs, or between the steps of one run.

    Args:
        evaluated: by run.
    """
    found: list[Difference] = []
    values: dict[str, dict[str, list[Any]]] = {}
    keys = {key for rows in evaluated.values() for one in rows for key in one.protocol} - set(FREE_OF_PROTOCOL)
    for key in sorted(keys):
        for run, rows in evaluated.items():
            seen = {json.dumps(one.protocol.get(key), sort_keys=True): one.protocol.get(key) for one in rows}
            values.setdefault(key, {})[run] = list(seen.values())
        shown = {run: seen[0] if len(seen) == 1 else seen for run, seen in values[key].items()}
        mixed = any(len(seen) > 1 for seen in values[key].values())
        _compare(found, EVALUATOR + key, shown, metric, allowed, mixed)
    return found


def circular(extractor: str, runs: dict[str, RunData], random: bool = False) -> list[str]:
    """Target encoders of the runs that are of the extractor's family: a distance in their features is what the
    alignment was trained on, so it proves nothing.

    Args:
        random: the extractor has random weights; so it is another network than a trained target.
    """
    terms = [term for run in runs.values() for term in run.terms.values() if (term.weights == "random") == random]
    targets = sorted({term.encoder for term in terms})
    return [encoder for encoder in targets if extractor and family(encoder) == family(extractor)]


def family(name: str) -> str:
    """`dinov2-reg-vit-b` -> `dinov2`: sizes and registers are one way of seeing."""
    return name.replace("_", "-").split("-")[0]


def warnings(groups: Groups, found: list[Difference]) -> list[str]:
    """What makes the comparison unfair or unsure, a line each."""
    lines = []
    for one in found:
        values = ", ".join(f"{run}: {show(value)}" for run, value in one.values.items())
        what = {QUALITY: "quality or losses", TIMES: "times"}.get(one.protects, one.protects)
        verdict = "allowed by --allow" if one.allowed else f"do not compare the {what}"
        lines.append(f"{one.key} differs ({values}): {verdict}")
    runs = groups.runs
    pairs = {key: pair_id(run.identity) for key, run in runs.items()}
    if len(set(pairs.values())) > 1 and not any(one.protects == QUALITY for one in found):
        lines.append("pair ids differ")
    last = {key: int(run.rows.steps[-1]) for key, run in runs.items()}
    if len(set(last.values())) > 1:
        shown = ", ".join(f"{key}: {step}" for key, step in last.items())
        lines.append(f"last logged steps differ ({shown}): losses are compared at common steps")
    for key, run in runs.items():
        if run.status == RUNNING:
            lines.append(f"{key} is still running: its curves are not at their end, so there is no verdict yet")
        elif run.status != "FINISHED":
            lines.append(f"{key} is {run.status}, not FINISHED")
        lines += [f"{key}: {problem}" for problem in run.problems]
    if groups.alike:
        lines.append(f"both runs have method={next(iter(runs.values())).method}, and all else equal: no verdict")
    seeds = {key: variant.seeds for key, variant in groups.variants.items()}
    if len({tuple(sorted(one)) for one in seeds.values()}) > 1 and not groups.alike:
        shown = ", ".join(f"{key}: {', '.join(map(str, one))}" for key, one in seeds.items())
        lines.append(f"seeds differ ({shown}): runs are not taken as pairs")
    return lines


def show(value: Any) -> str:
    return "absent" if value is None else value if isinstance(value, str) else json.dumps(value)


def _compare(
    found: list[Difference],
    key: str,
    values: dict[str, Any],
    protects: str,
    allowed: tuple[str, ...],
    mixed: bool = False,
) -> None:
    if mixed or len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
        found.append(Difference(key, values, protects, key in allowed))
