"""Whether torch, the NVIDIA driver, the GPUs, NCCL and DALI of this machine fit each other.

`look` gathers the facts; the other functions are pure and say in one line (value, rule, remedy) what is wrong.
`repa-scale doctor` and the start of a run both ask here. torch is imported when facts are gathered, not before.
"""

from __future__ import annotations

import ctypes
import importlib.metadata as metadata
import os
import re
import shutil
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from repa_scale.errors import MachineError, reason

OLDEST = (8, 0)  # compute capability with native bf16; the Triton kernels are compiled for it and above
DALI_MAJORS = range(11, 20)  # of CUDA: `nvidia-dali-cuda110` and so on
DALI_EXTRAS = (12, 13)  # majors that pyproject.toml has an extra for: `dali-cuda12`, `dali-cuda13`


@dataclass(frozen=True)
class Facts:
    """What a machine has.

    Attributes:
        torch: version of torch.
        built: CUDA version that torch was built for, such as `"13.0"`; None for a CPU build.
        driver: newest CUDA version that the driver runs; None without a driver.
        gpus: NVIDIA GPUs in the machine, whether or not torch can use them.
        hidden: CUDA_VISIBLE_DEVICES hides all of them.
        capabilities: compute capability of each GPU that torch can use.
        oldest: lowest compute capability that torch was built for; None if unknown.
        nccl: version of NCCL; None where torch was built without it.
        failure: torch's words where it cannot start CUDA.
    """

    torch: str
    built: str | None = None
    driver: str | None = None
    gpus: int = 0
    hidden: bool = False
    capabilities: tuple[tuple[int, int], ...] = ()
    oldest: tuple[int, int] | None = None
    nccl: str | None = None
    failure: str = ""


def look(environment: Mapping[str, str] = os.environ) -> Facts:
    """The facts of this machine. Starts CUDA where torch is a CUDA build and there is a driver."""
    import torch

    built, driver = torch.version.cuda, driver_cuda()
    capabilities, failure, oldest = (), "", None
    if built and driver:
        if torch.cuda.is_available():
            capabilities = tuple(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
            oldest = min(map(_capability, torch.cuda.get_arch_list()), default=None)
        else:
            failure = _failure()
    return Facts(
        torch=torch.__version__,
        built=built,
        driver=driver,
        gpus=sum(1 for _ in Path("/dev").glob("nvidia[0-9]*")) or (_driver_gpus() if driver and not built else 0),
        hidden=_hidden(environment),
        capabilities=capabilities,
        oldest=oldest,
        nccl=_nccl() if built else None,
        failure=failure,
    )


def device_problem(facts: Facts) -> str | None:
    """Why torch can't use a GPU that is here; None where it can, and where there is none to use."""
    if facts.capabilities or facts.hidden:
        return None
    installed = f"this machine has {facts.gpus} GPU{'s' * (facts.gpus > 1)}, but "
    if facts.built is None:
        return (
            f"{installed}torch {facts.torch} is not a CUDA build; install a CUDA build of torch" if facts.gpus else None
        )
    if facts.driver is None:
        return (
            f"{installed}no NVIDIA driver can be loaded (libcuda.so.1); install one for CUDA {major(facts.built)}.0 or "
            "newer, or start the container with --gpus all"
            if facts.gpus
            else None
        )
    if major(facts.driver) < major(facts.built):
        return (
            f"the NVIDIA driver runs CUDA {facts.driver} at most, and torch {facts.torch} is built for CUDA "
            f"{facts.built}; install a driver for CUDA {major(facts.built)}.0 or newer, or a build of torch for CUDA "
            f"{major(facts.driver)}"
        )
    if facts.gpus:
        return (
            f"torch can't start CUDA on this machine's {facts.gpus} GPUs ({facts.failure or 'no reason given'}); see "
            "CUDA_VISIBLE_DEVICES, `nvidia-smi` and `dmesg`"
        )
    return None


def absence(facts: Facts) -> str:
    """Why there is no GPU to use, where `device_problem` found nothing, and how to get one."""
    if facts.built is None:
        beside = f", though there is a driver for CUDA {facts.driver}" if facts.driver else ""
        return f"torch {facts.torch} is not a CUDA build{beside}; install a CUDA build of torch to use a GPU"
    if facts.driver is None:
        return (
            f"torch {facts.torch} is built for CUDA {facts.built}, but there is no NVIDIA driver; install one for CUDA "
            f"{major(facts.built)}.0 or newer, or start the container with --gpus all"
        )
    if facts.hidden:
        return "CUDA_VISIBLE_DEVICES hides every GPU; unset it to use them"
    return "the NVIDIA driver shows no GPU; see `nvidia-smi`"


def precision_problem(facts: Facts, precision: str) -> str | None:
    """Why the GPUs that torch sees can't compute in `precision` (`bf16`, `fp16` or `fp32`)."""
    for number, capability in enumerate(facts.capabilities):
        if facts.oldest and capability < facts.oldest:
            return (
                f"GPU {number} is {_sm(capability)}, and torch {facts.torch} for CUDA {facts.built} has code for "
                f"{_sm(facts.oldest)} and above; install a build of torch for an older CUDA"
            )
        if precision == "bf16" and capability < OLDEST:
            return (
                f"GPU {number} is {_sm(capability)}, and train.precision=bf16 needs {_sm(OLDEST)} (A100) or above; "
                "use train.precision=fp16 or fp32"
            )
    return None


def nccl_problem(facts: Facts) -> str | None:
    """Why processes on GPUs can't join each other."""
    if facts.capabilities and facts.nccl is None:
        return (
            f"torch {facts.torch} for CUDA {facts.built} has no NCCL, which joins processes on GPUs; install a build "
            "of torch with NCCL, or set the device to cpu"
        )
    return None


def compiler_problem(compiler: str | None, include: str) -> str | None:
    """Why Triton can't build what launches its kernels, which it does at the first one of a machine.

    Args:
        compiler: a C compiler; None: there is none.
        include: folder of the interpreter's headers.
    """
    missing = [] if compiler else ["a C compiler"]
    if not Path(include, "Python.h").is_file():
        missing.append(f"Python's headers ({include}/Python.h)")
    if not missing:
        return None
    packages = " ".join(["gcc"] * (not compiler) + [f"{Path(include).name}-dev"] * ("Python" in missing[-1]))
    return (
        f"Triton needs {' and '.join(missing)} to launch its kernels; apt-get install {packages}, or use "
        "alignment.kernel=torch and train.compile=false"
    )


def find_compiler() -> tuple[str | None, str]:
    """The arguments of `compiler_problem`, as Triton looks for them."""
    names = (os.environ.get("CC") or "gcc", "clang")
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # of Debian's and Ubuntu's own Python; its folder may be /usr/local/include
        scheme = "posix_prefix"
    return next((name for name in names if shutil.which(name)), None), sysconfig.get_paths(scheme)["include"]


def check_precision(precision: str) -> None:
    """Refuses a run on GPUs that can't compute in `precision`.

    Raises:
        MachineError: with the reason.
    """
    if problem := precision_problem(look(), precision):
        raise MachineError(problem)


def dali_problem() -> str | None:
    """Why the installed DALI can't work beside this torch and driver; None where it can, or none is installed."""
    import torch

    return dali_mismatch(installed_dali(), torch.version.cuda, driver_cuda())


def dali_mismatch(installed: list[str], built: str | None, driver: str | None = None) -> str | None:
    """`dali_problem` of facts: names of DALI's distributions, torch's CUDA version, the driver's."""
    if not installed or built is None:  # beside a CPU build of torch DALI decodes on the CPU, whichever it is
        return None
    wanted = f"nvidia-dali-cuda{major(built)}0"
    install = f"pip uninstall -y {' '.join(installed)}, then pip install {dali_requirement(built)}"
    if len(installed) > 1:
        return f"{' and '.join(installed)} overwrite each other's files; {install}"
    if installed != [wanted]:
        return f"{installed[0]} is not for CUDA {built}, which torch is built for; {install}"
    if driver is not None and major(driver) < major(built):
        return (
            f"{wanted} needs a driver for CUDA {major(built)}.0 or newer, and this one runs CUDA {driver} at most; "
            "install a newer driver, or builds of torch and DALI for an older CUDA"
        )
    return None


def installed_dali() -> list[str]:
    """Names of the installed distributions of DALI, one per CUDA major version."""
    found = []
    for number in DALI_MAJORS:
        with suppress(metadata.PackageNotFoundError):
            metadata.version(f"nvidia-dali-cuda{number}0")
            found.append(f"nvidia-dali-cuda{number}0")
    return found


def dali_requirement(built: str | None) -> str:
    """What to install for the DALI that belongs to a torch built for CUDA `built`."""
    if built is None:
        return "'repa-scale[dali]'"
    return (
        f"'repa-scale[dali-cuda{major(built)}]'" if major(built) in DALI_EXTRAS else f"nvidia-dali-cuda{major(built)}0"
    )


def driver_cuda() -> str | None:
    """The newest CUDA version that the driver runs, from the driver's own library; None without a driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _driver_gpus() -> int:
    """GPUs that the driver shows where /dev has none of their names, as under WSL. For a torch without CUDA: it starts
    the driver in this process."""
    count = ctypes.c_int()
    try:
        library = ctypes.CDLL("libcuda.so.1")
        if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return 0
    except (OSError, AttributeError):
        return 0
    return count.value


def major(version: str) -> int:
    return int(version.partition(".")[0])


def _failure() -> str:
    """Why CUDA doesn't start, in torch's words on one line."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return reason(error)
    return ""


def _hidden(environment: Mapping[str, str]) -> bool:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible)


def _nccl() -> str | None:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _capability(name: str) -> tuple[int, int]:
    """`sm_90a` or `compute_90` -> (9, 0)."""
    digits = re.sub(r"\D", "", name)
    return int(digits[:-1]), int(digits[-1])


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
