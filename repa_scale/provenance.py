"""Which version of the code a run was trained with."""

from __future__ import annotations

import functools
import subprocess


@functools.cache
def git_commit() -> str:
    """The commit of the working folder's repository; `none` outside one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() or "none"
