"""What `train.deterministic` sets in torch."""

from __future__ import annotations

import os

import torch


def use_deterministic_algorithms() -> None:
    """Every later operation computes the same bits each time, on one machine, or raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Else torch fills each new `empty` with NaN, to show reads of memory that was never written: a launch and a pass
    # over the memory per activation and bucket, and no bit of a program that writes before it reads.
    torch.utils.deterministic.fill_uninitialized_memory = False
