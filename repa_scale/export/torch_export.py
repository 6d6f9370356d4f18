"""The form `torch-export`: the guided step by torch.export and AOTInductor, the decoder, and a script to run them."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from repa_scale import arithmetic, rng
from repa_scale.errors import UserError, reason
from repa_scale.export import Options, standalone
from repa_scale.export.step import (
    GuidedStep,
    build_decoder,
    build_step,
    check_decoder,
    check_step,
    shape_facts,
    step_inputs,
    trace_decoder,
    trace_step,
)
from repa_scale.trained import Source

STEP_FILE = "denoiser.pt2"
DECODER_FILE = "decoder.pt2"
COMPILED_FILE = "denoiser.aoti.pt2"
CUDA_FILE = "denoiser.cuda.aoti.pt2"
SCRIPT = "sample.py"


def write(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    """denoiser.pt2, denoiser.aoti.pt2 (denoiser.cuda.aoti.pt2 where there is a GPU), decoder.pt2, sample.py, rng.py.

    The package for the GPU is an extra: where it cannot be made, the export says why and goes without it.

    Raises:
        UserError: no C++ compiler, or a program that differs from PyTorch by more than its bound.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"--to torch-export: AOTInductor needs the C++ compiler {compiler}, which is not on PATH; "
            "install g++, or name another by the variable CXX"
        )
    step = build_step(source, options)
    facts = write_programs(source, folder, options, step)
    facts["checks"][COMPILED_FILE] = _package(folder, COMPILED_FILE, "cpu", step, source, options)
    if torch.cuda.is_available():
        try:
            facts["checks"][CUDA_FILE] = _package(folder, CUDA_FILE, "cuda", step, source, options)
            facts["gpu"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
        except Exception as error:  # of the compiler, the driver, memory, or too large an error
            (folder / CUDA_FILE).unlink(missing_ok=True)
            facts["left_out"] = {CUDA_FILE: reason(error)}
            print(f"{CUDA_FILE} is left out, all else is there: {reason(error)}", file=sys.stderr, flush=True)
    write_script(folder)
    return facts | {"torch": torch.__version__.split("+")[0], "cpu": _instructions()} | worst(facts["checks"])


def _package(
    folder: Path, file: str, device: str, step: GuidedStep, source: Source, options: Options
) -> dict[str, float]:
    """Compiles denoiser.pt2 for a device and checks what was compiled; returns the check."""
    program = torch.export.load(folder / STEP_FILE)
    program.example_inputs = (step_inputs(source.config, 3, 1), {})  # AOTInductor asks for them
    with arithmetic.within("fp32"):
        run = _compile(program, folder / file, device)
    return check_step(file, run, step, options, source.config)


def write_programs(source: Source, folder: Path, options: Options, step: GuidedStep) -> dict[str, Any]:
    """denoiser.pt2 and decoder.pt2, each read back and checked; returns their facts."""
    config = source.config
    decoder = build_decoder(source, options)
    torch.export.save(trace_step(step, config), folder / STEP_FILE)
    torch.export.save(trace_decoder(decoder, config), folder / DECODER_FILE)
    checks = {
        STEP_FILE: check_step(STEP_FILE, load(folder / STEP_FILE), step, options, config),
        DECODER_FILE: check_decoder(DECODER_FILE, load(folder / DECODER_FILE), decoder, config),
    }
    return {**shape_facts(config), "checks": checks}


def write_script(folder: Path) -> None:
    """sample.py, which runs the programs without this package, and rng.py, which gives it our noise."""
    shutil.copyfile(standalone.__file__, folder / SCRIPT)
    shutil.copyfile(rng.__file__, folder / "rng.py")


def worst(checks: dict[str, dict[str, float]]) -> dict[str, float]:
    """The check that came nearest to its bound."""
    return max(checks.values(), key=lambda check: check["max_error"] / check["bound"])


def load(file: Path) -> Callable[..., Tensor]:
    """A program of this form as a function."""
    return torch.export.load(file).module()


@torch.no_grad()
def _compile(program: ExportedProgram, file: Path, device: str) -> Callable[..., Tensor]:
    """Compiles a package for `device`; returns it loaded, as a function of tensors on the CPU."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch.export.passes import move_to_device_pass

    if device != "cpu":
        program = move_to_device_pass(program, device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of what torch itself calls
            aoti_compile_and_package(program, package_path=str(file))
        loaded = aoti_load_package(str(file))
    except Exception as error:  # the compiler's, the linker's and inductor's own kinds
        raise UserError(f"--to torch-export: AOTInductor failed for {device}: {reason(error)}") from error
    return lambda *inputs: loaded(*(value.to(device) for value in inputs)).cpu()


def _instructions() -> str:
    """The vector instructions that the compiled package needs of a CPU."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return str(pick_vec_isa()) or "baseline"
