"""What a check is asked about, and what it says. Plain values: they travel between nodes as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, NOTE, WARN, FAIL = "ok", "note", "warn", "FAIL"
ORDER = (FAIL, WARN, NOTE, OK)


@dataclass(frozen=True)
class Finding:
    """One check on one node.

    Attributes:
        state: ok; note (nothing to mend, worth knowing); warn (a run works, worse); FAIL (a run would not).
        found: what was seen, with its numbers and units.
        remedy: what to do; empty for ok and note.
    """

    check: str
    state: str
    found: str
    remedy: str = ""
    node: str = ""


@dataclass
class Look:
    """What a node's checks need to know of the run.

    Attributes:
        config: of the run, as `dataclasses.asdict` gives it; None: no run was named.
        config_file, deepspeed_file: files that each node reads for itself; empty: none.
        run_dir: where checkpoints go, absolute.
        marker: a file that the asking machine made in or above `run_dir`: a node that sees it shares that folder.
        first: whether rank 0 will be on this node.
        slots: processes (GPUs) that the job takes on this node; None: all that there are.
        checkpoint_bytes, kept_bytes: of one checkpoint over all ranks, and of those that stay.
        nodes: of the job.
        port: on which the ranks meet; 0: any.
        fetch: bring weights here instead of checking.
    """

    config: dict[str, Any] | None = None
    config_file: str = ""
    deepspeed_file: str = ""
    run_dir: str = ""
    marker: str = ""
    first: bool = True
    slots: int | None = None
    checkpoint_bytes: int = 0
    kept_bytes: int = 0
    nodes: int = 1
    port: int = 0
    fetch: bool = False
    variables: dict[str, str] = field(default_factory=dict)
