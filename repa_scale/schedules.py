"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from repa_scale.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of step `step`, counted from 1: linear warm-up, then constant or a decay to 0 at schedule_steps."""
    rate = config.learning_rate
    if step <= config.warmup_steps:
        return rate * step / config.warmup_steps
    if config.schedule == "constant" or config.schedule_steps is None:
        return rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.schedule_steps - config.warmup_steps))
    if config.schedule == "linear":
        return rate * (1.0 - progress)
    return rate * 0.5 * (1.0 + math.cos(math.pi * progress))
