"""What this machine is: GPU, driver, versions. Exits with code 64 where the pieces of benchmarks/gpu.sh cannot run.

python -m benchmarks.environment
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata

from repa_scale.errors import ExitCode, UserError, reason

PACKAGES = (
    "torch",
    "triton",
    "deepspeed",
    "timm",
    "torchvision",
    "numpy",
    "pydantic",
    "pillow",
    "pytest",
    "repa-scale",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="a CPU will do")
    args = parser.parse_args(argv)
    try:
        check_torch()
        found = {"versions": versions(), "host": host(), "gpu": None if args.rehearse else gpu()}
        check_deepspeed()
    except UserError as error:
        print(f"environment: error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    from benchmarks.command import put_row

    put_row("environment", found, args.rehearse)
    for group, values in found.items():
        for key, value in (values or {}).items():
            print(f"{group:9s} {key:18s} {value}")
    return 0


def gpu() -> dict:
    """The GPU and its driver.

    Raises:
        UserError: there is none that this torch and its driver can use, or it is too old.
    """
    from repa_scale import cuda

    facts = cuda.look()
    absent = None if facts.capabilities else cuda.absence(facts)
    if problem := cuda.device_problem(facts) or absent or cuda.precision_problem(facts, "bf16"):
        raise UserError(f"{problem}; --rehearse needs no GPU")
    # These break some pieces; the others may still run.
    problems = [p for p in (cuda.nccl_problem(facts), cuda.compiler_problem(*cuda.find_compiler())) if p]
    for problem in problems:
        print(f"environment: warning: {problem}", file=sys.stderr)
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": _smi("driver_version"),
        "driver_cuda": facts.driver,
        "clock_mhz": _smi("clocks.max.sm"),
        "power_limit": _smi("power.limit"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": facts.nccl,
        "problems": "; ".join(problems) or "none",
    }


def _smi(query: str) -> str:
    """One answer of nvidia-smi about the first GPU; empty where it has none."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def host() -> dict:
    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        # Triton compiles its launchers with it, Inductor its code for the CPU.
        "c_compiler": os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"),
    }


def check_torch() -> None:
    """Raises `UserError` where torch, which every piece needs, does not import."""
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a library of CUDA is missing
        raise UserError(
            f"torch does not import in {sys.executable} ({reason(error)}); set PYTHON to an interpreter that has it"
        ) from None


def check_deepspeed() -> None:
    """Raises `UserError` where DeepSpeed, which most pieces need, does not import."""
    try:
        importlib.import_module("deepspeed")
    except ImportError as error:
        raise UserError(
            f"DeepSpeed does not import ({reason(error)}); give --wheels a folder made by benchmarks/gpu_wheels.sh"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
