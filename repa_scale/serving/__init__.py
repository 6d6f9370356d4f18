"""A trained model for others to use: the pipeline in diffusers' layout, and the server that answers for it over HTTP.

Importing this package loads neither diffusers nor the web framework; each name below does when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from repa_scale import torchvision_fix
from repa_scale.errors import require

torchvision_fix.ensure()  # diffusers imports transformers, where it is installed, and that imports torchvision

_HOMES = {
    "SiTPipeline": "pipeline",
    "SiTTransformer2DModel": "transformer",
    "SiTScheduler": "scheduler",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("diffusers", "serve")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
