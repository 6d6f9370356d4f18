"""Checks of what is installed: versions, whether they fit each other, and the same code and settings on every node."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import platform
from pathlib import Path

from repa_scale import cuda as fit
from repa_scale.config import TrainConfig
from repa_scale.doctor.finding import FAIL, NOTE, OK, WARN, Finding, Look

SHOWN = ("torch", "deepspeed", "triton", "numpy", "timm", "diffusers", "mosaicml-streaming")
EXTRAS = ("train", "data", "track")  # that a run needs
# The distributions whose own requirements are compared with what is installed.
OWNERS = ("repa-scale", "torch", "torchvision", "deepspeed", "mosaicml-streaming")
# CPU builds of torch are installed without these, and constraints.txt pins them apart.
APART = {("torchvision", "torch"), ("torch", "triton")}
INSTALL = "install the versions of constraints.txt"


def python(look: Look) -> list[Finding]:
    """Python's version, against what the package asks for."""
    from packaging.specifiers import SpecifierSet

    asked = metadata.metadata("repa-scale")["Requires-Python"] or ""
    state = OK if platform.python_version() in SpecifierSet(asked) else FAIL
    return [Finding("python", state, platform.python_version(), "" if state == OK else f"use Python {asked}")]


def packages(look: Look) -> list[Finding]:
    """Versions of the stack, each against what the others ask of it."""
    from packaging.requirements import Requirement

    unfit = []
    for owner in OWNERS:
        if version(owner) is None:
            if owner == "repa-scale":
                return [Finding("packages", FAIL, "repa-scale is not installed", "pip install 'repa-scale[all]'")]
            continue
        for line in metadata.requires(owner) or []:
            asked = Requirement(line)
            extras = EXTRAS if owner == "repa-scale" else ("",)
            if asked.marker and not any(asked.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            have = version(asked.name)
            if have is None and (owner, asked.name) in APART:
                continue
            if have is None and owner == "repa-scale":
                unfit.append(f"{asked.name} is absent")
            elif have is not None and not asked.specifier.contains(have, prereleases=True):
                unfit.append(f"{asked.name} {have} ({owner} asks for {asked.specifier})")
    words = ", ".join(f"{name} {version(name)}" for name in SHOWN if version(name))
    if unfit:
        return [Finding("packages", FAIL, "; ".join(unfit), INSTALL)]
    return [Finding("packages", OK, words)]


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cuda(look: Look) -> list[Finding]:
    """torch's CUDA, the driver, NCCL, the GPUs' compute capability, and the DALI that belongs to them."""
    facts, dali = fit.look(), fit.installed_dali()
    precision = look.config["train"]["precision"] if look.config else TrainConfig().precision
    problems = [
        fit.device_problem(facts),
        fit.precision_problem(facts, precision),
        fit.nccl_problem(facts),
        fit.dali_mismatch(dali, facts.built),  # a driver too old for it is too old for torch
    ]
    if found := [finding("cuda", FAIL, problem) for problem in problems if problem]:
        return found
    if not facts.capabilities:
        state = FAIL if facts.built is None and facts.driver else WARN if facts.built else NOTE
        return [finding("cuda", state, fit.absence(facts))]
    words = f"torch for CUDA {facts.built}, NCCL {facts.nccl}, driver for CUDA {facts.driver}"
    return [Finding("cuda", OK, f"{words}, {dali[0] if dali else f'no DALI ({fit.dali_requirement(facts.built)})'}")]


def finding(check: str, state: str, line: str) -> Finding:
    """Of a line that ends with its remedy, after a semicolon."""
    found, _, remedy = line.partition("; ")
    return Finding(check, state, found, "" if state == NOTE else remedy)


def compiler(look: Look) -> list[Finding]:
    """A C compiler and Python's headers, which Triton's launchers and torch.compile need."""
    found, include = fit.find_compiler()
    if problem := fit.compiler_problem(found, include):
        return [finding("compiler", WARN, problem)]
    return [Finding("compiler", OK, found)]


def file_hash(path: str) -> str:
    """Of a file as this node sees it; `absent` where there is none."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return "absent"


def facts(look: Look) -> dict:
    """What all nodes must have in common (across.py)."""
    from repa_scale.deepspeed_config import packaged_file
    from repa_scale.launch.code import code_hashes, versions

    files = {
        "ds_config.json": str(packaged_file()),
        look.config_file: look.config_file,
        look.deepspeed_file: look.deepspeed_file,
    }
    import torch

    return {
        "gpus": torch.cuda.device_count(),
        "code": code_hashes(),
        "versions": versions(),
        "files": {name: file_hash(path) for name, path in files.items() if path},
    }
