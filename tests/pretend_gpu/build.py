"""Builds the pretend device as a shared library, once per source and torch build, into a cache outside the tree."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "device.cpp", FOLDER / "operators.cpp")
FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
)
OLDEST = (2, 13)  # of torch: the fake process group of 2.11 leaves reduced gradients unset


def obstacle() -> str:
    """Why the device cannot be had here; empty if it can."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return f"torch {torch.__version__} brings a GPU backend of its own, whose place the pretend device would take"
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return f"torch {torch.__version__} is older than {wanted}, and its fake process group reduces nothing"
    if compiler() is None:
        return "no C++ compiler (g++ or CXX) to build the pretend device with"
    return ""


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def library() -> Path:
    """The shared library, built if need be; about a minute.

    Raises:
        RuntimeError: the compiler refuses the sources.
    """
    torch_folder = Path(torch.__file__).parent
    recipe = [compiler(), *FLAGS, str(torch_folder), torch.__version__]
    recipe += [path.read_text() for path in (FOLDER / "device.h", *SOURCES)]
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repa_scale" / "pretend_gpu"
    built = cache / f"{digest}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _build(built, torch_folder)
    return built


def _build(target: Path, torch_folder: Path) -> None:
    draft = target.with_name(f"{target.stem}.{os.getpid()}")
    objects = [draft.with_name(f"{draft.name}.{source.stem}.o") for source in SOURCES]
    includes = [f"-isystem{torch_folder / 'include' / part}" for part in ("", "torch/csrc/api/include")]
    libraries = torch_folder / "lib"
    try:
        _together(
            [compiler(), *FLAGS, *includes, "-c", source, "-o", object_file]
            for source, object_file in zip(SOURCES, objects, strict=True)
        )
        linked = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-ltorch", "-lc10"]
        _together([[compiler(), "-shared", *objects, "-o", draft, "-Wl,--no-as-needed", *linked]])
        draft.rename(target)
    finally:
        for path in (draft, *objects):
            path.unlink(missing_ok=True)


def _together(commands) -> None:
    """Runs the commands side by side."""
    started = [
        subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("the pretend device does not build:\n" + "\n".join(outputs)[-4000:])
