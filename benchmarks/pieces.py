"""The pieces of benchmarks/gpu.sh in the order of their worth: what each runs, and for how long at most."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = "environment"  # runs first, whatever pieces are asked for
TINY = ("--rehearse",)
REHEARSAL_SECONDS = 600.0  # limit per piece of a rehearsal, where two cores do a GPU's work


@dataclass(frozen=True)
class Piece:
    """One process of the program.

    Attributes:
        name: `GROUP` or `GROUP/CASE`; the command line may name either.
        seconds: time limit.
        command: arguments of Python.
        rehearsal: arguments to add in a rehearsal on a CPU.
        rehearsal_environment: variables to set in a rehearsal.
        environment: variables to set always.
        needs_public: needs a checkout of the public REPA code.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] = TINY
    rehearsal_environment: Mapping[str, str] = field(default_factory=dict)
    needs_public: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]


def pieces(public: Path | None) -> list[Piece]:
    """All pieces, in the order in which they run.

    Args:
        public: a checkout of the public REPA code; None leaves pieces that need it in the list, to be reported.
    """
    return [
        Piece(ENVIRONMENT, 45, _program("environment")),  # the first import of torch, from a cold disk
        _tests("tests", 90, "not training", "tests/kernels/test_on_gpu.py", "tests/test_rng.py"),
        Piece("truth", 75, _program("truth")),
        Piece("verbs", 120, _program("truth_verbs")),  # AOTInductor compiles twice
        _ours("compiled-32", "--batch", "32", "--compile", seconds=80),  # Inductor's cache is cold
        _public(public, "32"),
        _ours("eager-32", "--batch", "32"),
        _ours("compiled-128", "--batch", "128", "--compile", seconds=80),
        _public(public, "64"),
        _kernels("main", "65536", "768", "1536"),
        Piece("kernels/host", 30, _program("kernel_host")),
        Piece("profile", 60, _program("profile_step", "--batch", "32", "--compile"), (*TINY, "--batch", "2")),
        Piece("nvjpeg", 60, _program("nvjpeg")),
        # The rest, while time is left.
        _tests("training", 100, "training", "tests/kernels/test_on_gpu.py"),
        _ours("stage2-32", "--batch", "32", "--stage", "2"),
        _ours("stage2-unchecked-32", "--batch", "32", "--stage", "2", "--no-overflow-check"),
        Piece("step_overhead", 45, _program("step_overhead", "--rounds", "20")),
        Piece("rng", 30, _program("rng", "--rounds", "20")),
        Piece("memory", 60, _program("zero_memory", "--processes", "1")),
        _kernels("widths", "65536", "384", "1024"),
        _kernels("rows", "8192", "768", "1536"),
        Piece("tuning", 90, _program("kernel_tuning"), rehearsal_environment={"TRITON_INTERPRET": "1"}),
    ]


def _program(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", *arguments)


def _ours(name: str, *arguments: str, seconds: float = 50) -> Piece:
    command = _program("train_throughput", "--way", "ours", *arguments)
    return Piece(f"throughput/ours-{name}", seconds, command, (*TINY, "--batch", "2"))


def _public(checkout: Path | None, batch: str) -> Piece:
    command = _program("train_throughput", "--way", "public", "--batch", batch, "--public", str(checkout))
    return Piece(f"throughput/public-{batch}", 50, command, (*TINY, "--batch", "2"), needs_public=True)


def _kernels(name: str, rows: str, *widths: str) -> Piece:
    command = _program("kernels", "--seconds", "50", "--rows", rows, "--widths", *widths)
    return Piece(f"kernels/{name}", 60, command, (*TINY, "--rows", "256", "--widths", "64"))


def _tests(name: str, seconds: float, chosen: str, *files: str) -> Piece:
    """GPU tests in parallel processes; nothing is timed in them.

    The package comes from PYTHONPATH, where it has its installed layout, so pytest may not put the checkout in front.
    """
    processes = min(12, len(os.sched_getaffinity(0)))
    command = ("-m", "pytest", "-v", "-m", "gpu", "-k", chosen, "-n", str(processes), "-p", "no:cacheprovider")
    command += ("-o", "pythonpath=", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}")
    command += tuple(str(ROOT / file) for file in files)
    rehearsal = {"REPA_SCALE_REHEARSE": "1", "TRITON_INTERPRET": "1"}
    return Piece(name, seconds, command, (), rehearsal, environment={"OMP_NUM_THREADS": "1"})  # they share the cores
