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
OLDEST = (8, 0)  # compute capability: below it bf16 is not native


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="a CPU will do")
    args = parser.parse_args(argv)
    try:
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
        UserError: there is none that torch can use.
    """
    import torch

    if torch.version.cuda is None:
        raise UserError(f"torch {torch.__version__} is a build without CUDA; install a CUDA build, or use --rehearse")
    driver = _smi("driver_version")
    if not torch.cuda.is_available():
        seen = f"driver {driver}" if driver else "no driver"
        raise UserError(
            f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no usable GPU here ({seen}); install a "
            "driver that is as new, or use --rehearse"
        )
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    if capability < OLDEST:
        raise UserError(
            f"{properties.name} has compute capability {capability[0]}.{capability[1]}, and 8.0 is the least; "
            "use an A100, H100 or newer"
        )
    return {
        "name": properties.name,
        "capability": f"{capability[0]}.{capability[1]}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "clock_mhz": _smi("clocks.max.sm"),
        "power_limit": _smi("power.limit"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none",
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
