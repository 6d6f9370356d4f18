"""RUN/evaluations.jsonl: measured qualities of a run's samples, by step, with what makes two of them comparable."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "evaluations.jsonl"
PREFIX = "eval/"  # of the metrics' names in MLflow


@dataclass(frozen=True)
class Evaluation:
    """One metric of one checkpoint's samples.

    Attributes:
        step: optimiser steps that the checkpoint has seen.
        attempt: of the run, when it was measured; of equal steps and names the highest, then the later, counts.
        time: unix time in seconds.
        metric: `fid`, `fd_effnet`, `kid_effnet` ... (metrics/): never a name that says more than what was measured.
        count: samples.
        low, high: 95 % confidence interval, by bootstrap over the samples; None: not computed.
        protocol: what must be equal for two values to be compared: `extractor`, `reference`, `weights`, `sampler`,
            `steps`, `guidance`, `interval`, `labels`, `seed` ...
    """

    step: int
    attempt: int
    time: float
    metric: str
    value: float
    count: int
    low: float | None = None
    high: float | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name in MLflow: it says the number of samples, so that nobody takes it for another one's value."""
        return f"{PREFIX}{self.metric}_n{self.count}"

    def points(self) -> dict[str, float]:
        """What MLflow and TensorBoard draw of it: the value and, where there is one, its interval."""
        bounds = {f"{self.name}_low": self.low, f"{self.name}_high": self.high}
        return {self.name: self.value, **{name: value for name, value in bounds.items() if value is not None}}


def append(run: Path, evaluation: Evaluation) -> None:
    """Adds one line to RUN/evaluations.jsonl. Values that are not finite are refused: they say nothing.

    Raises:
        ValueError: the value is not finite.
    """
    if not math.isfinite(evaluation.value):
        raise ValueError(f"{evaluation.name} at step {evaluation.step} is {evaluation.value}")
    with (run / FILE).open("a") as file:
        file.write(json.dumps(asdict(evaluation)) + "\n")


def read(run: Path) -> list[Evaluation]:
    """Those that count, by name and step. A torn last line is skipped; no file: none."""
    try:
        lines = (run / FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    counting: dict[tuple[str, int], Evaluation] = {}
    for line in lines:
        try:
            found = Evaluation(**json.loads(line))
        except (ValueError, TypeError):  # cut off by a kill
            continue
        before = counting.get((found.name, found.step))
        if before is None or found.attempt >= before.attempt:
            counting[found.name, found.step] = found
    return [counting[key] for key in sorted(counting)]
