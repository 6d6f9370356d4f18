"""Which ZeRO stage and micro batch to take: the fastest of all that fit, and of equally fast ones the smallest."""

from __future__ import annotations

import dataclasses
from typing import Any

from repa_scale.config import Config
from repa_scale.plan.cluster import Cluster
from repa_scale.plan.estimate import Shape, fits, memory_of, step_of

STAGES = (3, 2, 1)
EQUAL = 0.02  # relative difference of step times that the formulas cannot tell apart


def advise(shape: Shape, config: Config, cluster: Cluster) -> dict[str, Any]:
    """The settings to take, with their step time and memory; `fits` is false where nothing does.

    Activation checkpointing is advised only where nothing fits without it.
    """
    share = config.train.global_batch // cluster.ranks
    tried = [
        dataclasses.replace(shape, stage=stage, micro_batch=micro, passes=share // micro, checkpointed=checkpointed)
        for checkpointed in dict.fromkeys((shape.checkpointed, True))
        for stage in STAGES
        for micro in range(1, share + 1)
        if share % micro == 0
    ]
    for checkpointed in (False, True):
        good = [each for each in tried if each.checkpointed == checkpointed and _fits(each, cluster)]
        if good:
            fastest = min(step_of(each, cluster).seconds for each in good)
            equal = [each for each in good if step_of(each, cluster).seconds <= (1 + EQUAL) * fastest]
            return _values(min(equal, key=lambda each: memory_of(each, cluster.ranks).peak), cluster)
    return _values(min(tried, key=lambda each: memory_of(each, cluster.ranks).peak), cluster)


def _fits(shape: Shape, cluster: Cluster) -> bool:
    return fits(memory_of(shape, cluster.ranks), cluster)


def _values(shape: Shape, cluster: Cluster) -> dict[str, Any]:
    held, step = memory_of(shape, cluster.ranks), step_of(shape, cluster)
    return {
        "fits": fits(held, cluster),
        "zero_stage": shape.stage,
        "micro_batch": shape.micro_batch,
        "accumulation": shape.passes,
        "activation_checkpointing": shape.checkpointed,
        "peak_bytes": held.peak,
        "step_seconds": step.seconds,
        "bound_by": step.bound_by,
    }
