"""A process group of this process alone, for tests that build a real DeepSpeed engine."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from repa_scale.ranks import Ranks


@contextmanager
def group_of_one() -> Iterator[Ranks]:
    """Joins on the CPU and leaves; DeepSpeed forgets its groups, so that another test of this process can join anew."""
    forget_groups()
    ranks = Ranks.from_environment("cpu")
    ranks.start()
    try:
        yield ranks
    finally:
        ranks.leave()
        forget_groups()


def forget_groups() -> None:
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        comm.cdb = None
        importlib.reload(groups)
