"""`repa-scale plan`: memory, step time, days, cost, checkpoints and data rates of a run, before a cluster is booked."""

from __future__ import annotations

import json
from typing import Any

EXAMPLE = "repa-scale plan experiment=repa_sit_xl nodes=8 gpus=8 gpu=H100 price=2.50"


def main(argv: list[str]) -> int:
    """Prints the plan. Code 0, also where the run does not fit: the plan says so."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    as_json = "--json" in argv
    values = plan([word for word in argv if word != "--json"])
    if as_json:
        print(json.dumps(values, indent=2))
        return 0
    from repa_scale.plan.page import page

    print(page(values))
    return 0


def plan(words: list[str]) -> dict[str, Any]:
    """The plan of the cluster and run that `key=value` words describe (values.py).

    Raises:
        ConfigError: an unknown key or name, or a batch that does not divide.
    """
    from repa_scale.compose import compose
    from repa_scale.objective import count_parameters
    from repa_scale.plan.cluster import parse_cluster
    from repa_scale.plan.values import plan_of
    from repa_scale.validation import validate

    cluster, rest = parse_cluster(words)
    config = compose(rest)
    if not config.data.remote:
        config.data.path = config.data.path or "not prepared yet"
    validate(config, cluster.ranks)
    return plan_of(config, cluster, count_parameters(config))


def help_text() -> str:
    """The help of `repa-scale plan`."""
    from repa_scale.plan.cluster import GPUS

    return "\n".join(
        [
            "usage: repa-scale plan [experiment=PRESET | --config FILE] [nodes=N] [gpus=N] [key=value ...] [--json]",
            "",
            "Memory per rank, step time and what binds it, days, GPU-hours, checkpoints, data rates, and advice.",
            "",
            f"example: {EXAMPLE}",
            "",
            "keys of the cluster, before any key of a run (docs/plan.md):",
            "  nodes=1 gpus=8   nodes, and GPUs of each",
            f"  gpu=H100         {', '.join(GPUS)}",
            "  network=0        Gbit/s of a node's network for each of its GPUs; 0: as such nodes are usually built",
            "  disk=2           GB/s that a node writes where checkpoints go",
            "  host=1           time of this host's Python against the CPU that was measured; 0.5: twice as fast",
            "  format=jpeg      of the prepared images: jpeg or png",
            "  images=1281167   in the data set",
            "  price=0          of a GPU-hour",
            "  --json           all values, for programs",
        ]
    )
