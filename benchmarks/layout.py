"""The package and the carried wheels laid out in a temporary folder, for the pieces of benchmarks/gpu.sh to import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

from benchmarks.pieces import ROOT
from repa_scale.errors import UserError

MAPPED = ("kernels", "configs", "launchers")  # top-level folders that are installed inside the package
# Variables of launchers. Each process of a piece is a run of its own: under `srun --pty`, or where an image sets
# MASTER_PORT, those that run side by side would meet at one port, and the second would fail.
LAUNCHERS = re.compile(r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|LOCAL_SIZE|MASTER_.*|SLURM_.*|OMPI_.*|PMI.*)")


def prepare(work: Path, out: Path, wheels: Path | None, rehearse: bool, log: BinaryIO) -> dict[str, str]:
    """Lays out the package and the wheels in `work`; returns the environment of the pieces.

    The package gets the layout of an installed one, as pyproject.toml maps it: an editable install would need a
    setuptools that the machine may lack, and would write into the source tree.

    Args:
        out: the folder of the results.
        wheels: made by gpu_wheels.sh; None: the machine has all that is needed.
        log: what pip says.

    Raises:
        UserError: the wheels do not fit this Python.
    """
    package, installed = work / "package", work / "wheels"
    for name in ("repa_scale", *MAPPED):
        target = package / name if name == "repa_scale" else package / "repa_scale" / name
        shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        for folder, _, _ in os.walk(target):  # a source tree that must not be written gives its modes to the copy
            os.chmod(folder, 0o755)
    shutil.copy(ROOT / "ds_config.json", package / "repa_scale" / "configs")
    _describe(package)
    if wheels is not None:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
        command += ["--quiet", "--no-compile", "--target", installed, *sorted(wheels.glob("*.whl"))]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log.write(done.stdout.encode())
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.strip()] or ["pip failed"]
            raise UserError(f"--wheels {wheels} does not fit {sys.executable}: {lines[-1]}")
    (work / "tmp").mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not LAUNCHERS.fullmatch(name)},
        "PYTHONPATH": os.pathsep.join(map(str, (package, installed, ROOT))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "BENCHMARK_OUT": str(out),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TMPDIR": str(work / "tmp"),
        "HF_HUB_OFFLINE": "1",
    }
    if commit := _commit(wheels):
        environment["BENCHMARK_COMMIT"] = commit
    if rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return environment


def _describe(package: Path) -> None:
    """Metadata, for those who ask importlib for the version."""
    from repa_scale import __version__

    folder = package / f"repa_scale-{__version__}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: repa-scale\nVersion: {__version__}\n")


def _commit(wheels: Path | None) -> str:
    """The commit that gpu_wheels.sh noted, for a copy of the code without its repository."""
    if os.environ.get("BENCHMARK_COMMIT") or wheels is None or (ROOT / ".git").exists():
        return os.environ.get("BENCHMARK_COMMIT", "")
    file = wheels / "commit"
    return file.read_text().strip() if file.is_file() else ""
