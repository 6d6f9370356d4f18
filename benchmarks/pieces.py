"""The pieces of benchmarks/gpu.sh in the order of their worth: what each runs, and for how long at most."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = "environment"  # runs first, whatever pieces are asked for
REHEARSAL_SECONDS = 300.0  # limit per piece of a rehearsal, where two cores do a GPU's work


@dataclass(frozen=True)
class Piece:
    """One process of the program.

    Attributes:
        name: `GROUP` or `GROUP/CASE`; the command line may name either.
        seconds: time limit.
        command: arguments of Python.
        rehearsal: arguments to add in a rehearsal on a CPU.
        rehearsal_environment: variables to set in a rehearsal.
        needs_public: needs a checkout of the public REPA code.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] = ("--rehearse",)
    rehearsal_environment: Mapping[str, str] = field(default_factory=dict)
    needs_public: bool = False

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]


def pieces(public: Path | None) -> list[Piece]:
    """All pieces, in the order in which they run.

    Args:
        public: a checkout of the public REPA code; None leaves pieces that need it in the list, to be reported.
    """
    return [
        Piece(ENVIRONMENT, 30, _program("environment")),
        _tests("tests", 90, "not training", "tests/kernels/test_on_gpu.py", "tests/test_rng.py"),
        Piece("truth", 75, _program("truth")),
        _throughput("ours-compiled-32", "--way", "ours", "--batch", "32", "--compile"),
        _throughput("public-32", "--way", "public", "--batch", "32", public=public),
        _throughput("ours-eager-32", "--way", "ours", "--batch", "32"),
        _throughput("ours-compiled-128", "--way", "ours", "--batch", "128", "--compile"),
        _throughput("public-64", "--way", "public", "--batch", "64", public=public),
        Piece("kernels/main", 60, _program("kernels", "--rows", "65536", "--widths", "768", "1536")),
        Piece("profile", 45, _program("profile_step")),
        Piece("nvjpeg", 40, _program("nvjpeg")),
        # The rest, while time is left.
        _tests("training", 100, "training", "tests/kernels/test_on_gpu.py"),
        _throughput("ours-eager-32-stage2", "--way", "ours", "--batch", "32", "--stage", "2"),
        Piece("step_overhead", 45, _program("step_overhead", "--rounds", "20")),
        Piece("rng", 30, _program("rng", "--rounds", "20")),
        Piece("memory", 45, _program("zero_memory", "--processes", "1")),
        Piece("kernels/widths", 60, _program("kernels", "--rows", "65536", "--widths", "384", "1024")),
        Piece("kernels/rows", 60, _program("kernels", "--rows", "8192", "--widths", "768", "1536")),
        Piece("tuning", 90, _program("kernel_tuning")),
    ]


def _program(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", *arguments)


def _throughput(name: str, *arguments: str, public: Path | None = None) -> Piece:
    needs_public = "public" in arguments
    checkout = ("--public", str(public)) if needs_public and public else ()
    command = _program("train_throughput", *arguments, *checkout)
    return Piece(f"throughput/{name}", 50, command, needs_public=needs_public)


def _tests(name: str, seconds: float, chosen: str, *files: str) -> Piece:
    """GPU tests in parallel processes; nothing is timed in them.

    The package comes from PYTHONPATH, where it has its installed layout, so pytest may not put the checkout in front.
    """
    processes = min(12, len(os.sched_getaffinity(0)))
    command = ("-m", "pytest", "-q", "-m", "gpu", "-k", chosen, "-n", str(processes), "-p", "no:cacheprovider")
    command += ("-o", "pythonpath=", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}")
    rehearsal = {"REPA_SCALE_REHEARSE": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return Piece(name, seconds, command + tuple(str(ROOT / file) for file in files), (), rehearsal)
