"""Makes torchvision importable beside a CPU build of torch, for timm and mosaicml-streaming, which import it.

There is no CPU build of torchvision: its compiled operators need CUDA's libraries and do not load, and then its import
fails because it describes two operators that nobody declared. Declared, they may stay without an implementation: no
code here calls them.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

_declared: list = []  # the declaration lives as long as its library object


def ensure() -> None:
    """Call this before the first import of torchvision, timm or streaming. Does nothing where torchvision works."""
    if _declared:
        return
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        return
    compiled = next(Path(found.submodule_search_locations[0]).glob("_C*.so"), None)
    if compiled is None or _loads(compiled):
        return
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


def _loads(library: Path) -> bool:
    import torch  # noqa: F401  (its libraries must be there first, as they are for torchvision)

    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True
