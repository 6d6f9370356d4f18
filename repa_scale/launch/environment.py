"""Which variables the ranks get, and which values nobody may see. They travel inside ssh, never on a command line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from repa_scale.errors import ConfigError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What the libraries of a run read, beyond what a log-in on the node sets by itself.
# Of the network: NCCL and gloo; libfabric, EFA and NCCL's plugin for them; UCX; verbs; SHARP; Omni-Path.
NETWORK = (
    *("NCCL_", "GLOO_", "FI_", "OFI_", "EFA_", "UCX_", "UCC_", "RDMAV_", "IBV_", "MLX5_", "SHARP_", "HCOLL_"),
    *("PSM2_", "PSM3_", "TORCH_NCCL_"),
)
PREFIXES = (
    *NETWORK,
    *("TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "TRITON_", "DALI_", "OMP_", "MKL_", "KMP_"),
    *("CUDA_", "CUBLAS_", "CUBLASLT_", "CUDNN_"),
    *("MLFLOW_", "HF_", "HUGGINGFACE_", "AWS_", "S3_", "GOOGLE_", "AZURE_", "OCI_", "DS_", "REPA_SCALE_"),
)
NAMES = ("DS_ACCELERATOR", "NVIDIA_TF32_OVERRIDE", "LD_LIBRARY_PATH", "PYTHONPATH", "TZ", "LANG")
PROXIES = ("http_proxy", "https_proxy", "no_proxy")
# These belong to one machine or one process, or are what the launchers set.
NOT = (
    *("CUDA_VISIBLE_DEVICES", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK"),
    *("CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT", "PWD", "OLDPWD", "_"),
    *("DS_ENV_FILE", "REPA_SCALE_JOB", "REPA_SCALE_OUTCOMES", "REPA_SCALE_SUPERVISED"),
)
# Read when a process starts, so they must be there by then; all others are set by the rank itself, so that even
# `ps e` of the same user does not show them.
AT_START = ("PYTHON", "LD_", "MALLOC_", "GLIBC_", "LANG", "LC_", "TZ")
SECRET = re.compile(r"PASSW|PWD$|SECRET|TOKEN|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH", re.IGNORECASE)
# The launcher's own children (ssh, pdsh, deepspeed) get these and nothing else: deepspeed exports what it finds.
PLAIN = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TMPDIR", "SSH_AUTH_SOCK", "VIRTUAL_ENV")
PLAIN_PREFIXES = ("PDSH_SSH_ARGS",)


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of this process that ranks on other nodes get."""
    return {
        name: value
        for name, value in environment.items()
        if (name in NAMES or name.lower() in PROXIES or name.startswith(PREFIXES)) and name not in NOT
    }


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that ranks on this machine get: all but the launcher's own."""
    return {name: value for name, value in environment.items() if name not in NOT}


def plain(environment: Mapping[str, str]) -> dict[str, str]:
    """What ssh, pdsh and deepspeed are started with."""
    return {name: v for name, v in environment.items() if name in PLAIN or name.startswith(PLAIN_PREFIXES)}


def secrets(variables: Mapping[str, str]) -> list[str]:
    """Values that are masked wherever they would be shown; short ones are words that stand everywhere."""
    return sorted({v for name, v in variables.items() if SECRET.search(name) and len(v) >= 6}, key=len, reverse=True)


def at_start(variables: Mapping[str, str]) -> dict[str, str]:
    """The part of `variables` that a process must be started with."""
    return {name: value for name, value in variables.items() if name.startswith(AT_START)}


def deepspeed_env_files() -> list[Path]:
    """Where deepspeed looks: `.deepspeed_env` (or $DS_ENV_FILE) in the home folder, then here."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    candidates = dict.fromkeys((Path.home() / name, Path.cwd() / name))
    return [path for path in candidates if path.is_file()]


def read_deepspeed_env(path: Path) -> dict[str, str]:
    """The variables of a `.deepspeed_env`: lines `NAME=VALUE`; of one name the last counts.

    A value stands as it is: nothing in it is run or expanded, here or on a node. `'...'` and `"..."` around a value
    are taken off.

    Raises:
        ConfigError: a line is wrong, or holds what a shell would expand, so that it is not clear what was meant.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    variables: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("export ").strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = (part.strip() for part in text.partition("="))
        where = f"{path} line {number}"  # the line itself may hold a password
        if not equals or not NAME.fullmatch(name):
            raise ConfigError(f"{where} is not of the form NAME=VALUE")
        quote = value[:1] if value[:1] in ("'", '"') else ""
        if quote and (len(value) < 2 or not value.endswith(quote)):
            raise ConfigError(f"{where}: the value of {name} begins with {quote} and does not end with it")
        if quote != "'" and re.search(r"[$`]", value):
            raise ConfigError(
                f"{where}: the value of {name} holds $ or `, which nothing expands here; "
                "write the value itself, or put it into '...' if it is meant as it stands"
            )
        variables[name] = value[1:-1] if quote else value
    return variables
