"""What code this machine would run: hashes of the package's files, and the versions that all nodes must share."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
from pathlib import Path

PARTS = ("repa_scale", "repa_scale.kernels", "repa_scale.configs")
SUFFIXES = (".py", ".yaml", ".json")
SHARED = ("torch", "deepspeed", "numpy", "timm", "diffusers", "mosaicml-streaming", "triton")


def code_hashes() -> dict[str, str]:
    """Hash by file, named as in the package; nothing of it is imported."""
    hashes = {}
    for part in PARTS:
        spec = importlib.util.find_spec(part)
        for root in map(Path, (spec and spec.submodule_search_locations) or ()):
            for file in sorted(root.rglob("*")):
                if file.suffix in SUFFIXES and file.is_file():
                    name = f"{part.replace('.', '/')}/{file.relative_to(root)}"
                    hashes[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return hashes


def versions() -> dict[str, str]:
    """Of Python and the packages that take part in the numbers; `none` where one is not installed."""
    found = {"python": platform.python_version()}
    for name in SHARED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def difference(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """In a few words what differs; empty: nothing."""
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if not names:
        return ""
    shown = [f"{name} ({theirs.get(name, 'absent')} there, {ours.get(name, 'absent')} here)" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
