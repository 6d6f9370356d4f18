"""What a start does beside its own work: which programs it runs, and whether anything would be compiled."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"}
_programs: list[str] = []


def install() -> None:
    """From here on every program that this process starts is written down, and a JIT build raises."""
    sys.addaudithook(_note)
    from torch.utils import cpp_extension

    for name in ("load", "load_inline", "_jit_compile"):
        setattr(cpp_extension, name, _refuse)


def write(path: Path) -> None:
    """{"programs": names of those that were started}."""
    path.write_text(json.dumps({"programs": sorted(set(_programs))}))


def _note(event: str, arguments: tuple) -> None:
    if event in STARTS:
        words = arguments[1] if event == "subprocess.Popen" else arguments[0]
        first = words if isinstance(words, str | bytes | os.PathLike) else words[0]
        _programs.append(os.path.basename(os.fsdecode(first)))


def _refuse(*arguments: object, **named: object) -> None:
    raise RuntimeError(f"a JIT build of {named.get('name', arguments[:1])}: a GPU machine may have no compiler")
