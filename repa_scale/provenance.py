"""Which code, packages and device a run was trained with."""

from __future__ import annotations

import functools
import platform
import subprocess


@functools.cache
def git_commit() -> str:
    """The commit of the working folder's repository; `none` outside one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() or "none"


def device_name(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def versions() -> str:
    """Of the packages that decide what a step computes: `repa_scale 0.1.0, torch 2.13.0, ...`."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"python {platform.python_version()}"]
    for package in ("repa-scale", "torch", "deepspeed", "numpy", "timm", "diffusers", "mosaicml-streaming", "triton"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
