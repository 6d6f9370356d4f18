"""Samples that cannot be read in training: what is known of each, what takes its place, and when there are too many."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from repa_scale import rng
from repa_scale.errors import DataError
from repa_scale.quantities import share

TRIES = 20  # samples in a row that cannot be read: then it is not the samples


@dataclass(frozen=True)
class BadSample:
    """A sample that training left out.

    Attributes:
        number: in the set, from 0.
        id: None where its shard cannot be read.
        position: in the global sequence, where another sample was taken instead.
    """

    number: int
    id: int | None
    shard: str
    reason: str
    position: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def replacement(position: int, tried: int, count: int, seed: int, fingerprint: str) -> int:
    """The sample that stands in at a global position after `tried` ones could not be read: for any ranks the same."""
    drawn = rng.uniform(seed, f"replacement of {fingerprint}", tried, torch.tensor([position]), (), dtype=torch.float64)
    return min(int(drawn.item() * count), count - 1)


class Quarantine:
    """The bad samples of a run, counted once each, on every rank alike.

    Args:
        most: share of the set above which a run must not go on.
    """

    def __init__(self, count: int, most: str) -> None:
        self.count, self.text, self.most = count, most, share(most)
        self.numbers: set[int] = set()

    def add(self, samples: list[BadSample]) -> list[BadSample]:
        """Takes them up; returns those that were not known."""
        new = []
        for sample in samples:
            if sample.number not in self.numbers:
                self.numbers.add(sample.number)
                new.append(sample)
        return new

    @property
    def problem(self) -> str:
        """Why the run must stop; empty: it may go on."""
        if len(self.numbers) <= self.most * self.count:
            return ""
        return (
            f"{len(self.numbers)} of {self.count} samples cannot be read, more than data.max_bad={self.text}; "
            "check the set with: repa-scale prepare --check"
        )

    def refuse(self, shards: dict[str, str], samples: int) -> None:
        """Before training: raises where the damaged shards alone hold too many samples.

        Args:
            shards: why, by name.
            samples: in them.
        """
        if samples > self.most * self.count:
            first = next(iter(shards.values()))
            more = f" and {len(shards) - 1} more shards" if len(shards) > 1 else ""
            raise DataError(
                f"{first}{more}: {samples} of {self.count} samples, more than data.max_bad={self.text} allows"
            )
