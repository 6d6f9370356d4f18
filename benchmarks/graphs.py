"""Whether torch.compile did what was asked: how many graphs it has made in this process."""

from __future__ import annotations

import sys


def compiled_graphs() -> int:
    """Graphs so far. 0 after a compiled call: it ran eagerly. More than before in measured calls: a recompilation."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
