"""A machine whose torch, driver, GPU, NCCL or DALI don't fit each other: one line each, and code 64 at the start."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import SMALL

from repa_scale import cuda, ranks
from repa_scale.cuda import Facts, dali_mismatch, device_problem, nccl_problem, precision_problem
from repa_scale.errors import MachineError

ROOT = Path(__file__).resolve().parents[1]
FITS = Facts("2.13.0", built="13.0", driver="13.1", gpus=8, capabilities=((9, 0),) * 8, oldest=(7, 5), nccl="2.29.7")
BLIND = replace(FITS, capabilities=(), failure="Error 802: system not yet initialized")
NONE = replace(FITS, driver=None, gpus=0, capabilities=())


def test_what_fits_is_no_problem():
    assert device_problem(FITS) is None and nccl_problem(FITS) is None
    assert [precision_problem(FITS, each) for each in ("fp32", "fp16", "bf16")] == [None] * 3
    # A driver runs what was built for its major version, older minor versions included.
    assert device_problem(replace(BLIND, built="13.4", driver="13.0", gpus=0)) is None


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (device_problem(replace(BLIND, driver="12.4")), ("CUDA 12.4 at most", "CUDA 13.0;", "driver for CUDA 13.0")),
        (device_problem(BLIND), ("this machine's 8 GPUs", "Error 802", "; see")),
        (precision_problem(replace(FITS, capabilities=((8, 0), (7, 5))), "bf16"), ("GPU 1 is sm_75", "sm_80", "; use")),
        (
            precision_problem(replace(FITS, capabilities=((7, 0),)), "fp16"),
            ("GPU 0 is sm_70", "sm_75 and", "; install"),
        ),
        (nccl_problem(replace(FITS, nccl=None)), ("2.13.0 for CUDA 13.0 has no NCCL", "; install")),
        (cuda.absence(NONE), ("there is no NVIDIA driver", "--gpus all")),
        (cuda.absence(replace(BLIND, hidden=True)), ("CUDA_VISIBLE_DEVICES hides", "; unset")),
        (cuda.absence(Facts("2.13.0+cpu", driver="13.0")), ("2.13.0+cpu is not a CUDA build", "driver for CUDA 13.0")),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_remedy(problem, words):
    assert all(each in problem for each in words) and "; " in problem and "\n" not in problem, problem


def test_hidden_gpus_are_no_problem():
    assert device_problem(replace(BLIND, hidden=True)) is None
    shown = {None: False, "": True, "-1": True, "NoDevFiles": True, "0,1": False, "GPU-5f3a": False, "MIG-7e": False}
    for value, hidden in shown.items():
        environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
        assert cuda.look(environment).hidden == hidden, value


@pytest.mark.parametrize(
    ("installed", "built", "driver", "words"),
    [
        ([], "13.0", "13.0", None),
        (["nvidia-dali-cuda130"], "13.0", "13.1", None),
        (["nvidia-dali-cuda120"], "12.6", "13.1", None),
        (["nvidia-dali-cuda130"], None, None, None),
        (
            ["nvidia-dali-cuda130"],
            "12.6",
            "13.0",
            "is not for CUDA 12.6, which torch is built for; pip uninstall -y nv",
        ),
        (["nvidia-dali-cuda120"], "13.0", "13.0", "then pip install 'repa-scale[dali-cuda13]'"),
        (["nvidia-dali-cuda130"], "13.0", "12.4", "needs a driver for CUDA 13.0 or newer, and this one runs CUDA 12.4"),
        (["nvidia-dali-cuda120", "nvidia-dali-cuda130"], "13.0", "13.0", "overwrite each other's files; pip uninstall"),
    ],
)
def test_dali_must_be_built_for_the_cuda_of_torch(installed, built, driver, words):
    problem = dali_mismatch(installed, built, driver)
    assert problem is None if words is None else words in problem


def test_triton_needs_a_compiler_and_the_headers_of_python(tmp_path):
    include = tmp_path / "python3.12"
    include.mkdir()
    bare = cuda.compiler_problem(None, str(include))
    assert "needs a C compiler and Python's headers" in bare and "apt-get install gcc python3.12-dev, or" in bare
    assert "apt-get install python3.12-dev, or" in cuda.compiler_problem("gcc", str(include))
    (include / "Python.h").touch()
    assert "apt-get install gcc, or" in cuda.compiler_problem(None, str(include))
    assert cuda.compiler_problem("gcc", str(include)) is None


def test_headers_are_looked_for_where_triton_does(monkeypatch):
    """The default scheme of Debian's and Ubuntu's own Python names a folder that holds no headers."""
    folders = {"posix_local": "/usr/local/include/python3.12", "posix_prefix": "/usr/include/python3.12"}
    monkeypatch.setattr(cuda.sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(cuda.sysconfig, "get_paths", lambda scheme="posix_local": {"include": folders[scheme]})
    assert cuda.find_compiler()[1] == "/usr/include/python3.12"


def test_each_extra_for_dali_is_in_the_package():
    for number in cuda.DALI_EXTRAS:
        assert f'\ndali-cuda{number} = ["nvidia-dali-cuda{number}0==' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (
            NONE,
            logging.INFO,
            "device auto: the CPU, because torch 2.13.0 is built for CUDA 13.0, but there is no NVIDIA",
        ),
        (Facts("2.13.0+cpu", driver="13.0"), logging.WARNING, "is not a CUDA build, though there is a driver"),
        (Facts("2.13.0+cpu"), None, ""),
    ],
)
def test_auto_takes_the_cpu_and_says_why(monkeypatch, caplog, facts, level, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "look", lambda: facts)
    with caplog.at_level(logging.INFO, "repa_scale"):
        assert ranks.pick_device("auto") == torch.device("cpu")
    assert [each.levelno for each in caplog.records] == ([level] if level else []) and words in caplog.text


def test_auto_refuses_a_gpu_that_torch_cannot_start(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "look", lambda: BLIND)
    with pytest.raises(MachineError, match="device auto: torch can't start CUDA on this machine's 8 GPUs"):
        ranks.pick_device("auto")
    assert ranks.pick_device("cpu") == torch.device("cpu")


# `repa-scale train` again and again in one process, under torch's answers on other machines; the driver's answer comes
# from a library that was compiled for it.
STARTS = """
import contextlib, io, json, os, sys
from types import SimpleNamespace
from unittest.mock import patch
import torch
from repa_scale import timeouts
from repa_scale.train import main

timeouts.TELL = 0.2  # rank 0 is not there

def start(variables, **answers):
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(patch.dict(os.environ, variables))
        stack.enter_context(patch.object(torch.version, "cuda", "13.0"))
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        code = main(sys.argv[1:])
    return [code, said.getvalue(), torch.distributed.is_initialized()]

seen = {"is_available": True, "device_count": 1, "get_arch_list": ["sm_75", "sm_80"]}
seen["get_device_properties"] = SimpleNamespace(major=9, minor=0)
far = {"RANK": "9", "LOCAL_RANK": "0", "WORLD_SIZE": "16", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
print(json.dumps([
    start({}),
    start(far),
    start({**far, "LOCAL_RANK": "1"}),
    start({}, **seen, get_device_capability=(7, 5)),
    start({}, **seen, get_device_capability=(8, 0)),
    start({"CC": "none", "PATH": "/nowhere"}, **seen, get_device_capability=(9, 0)),
]))
"""


@pytest.mark.skipif(shutil.which("gcc") is None or torch.cuda.is_available(), reason="needs gcc, and no GPU")
def test_the_start_is_refused_before_the_processes_join(digits, tmp_path):
    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int *version) { *version = 12040; return 0; }")
    library = ["gcc", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(library, cwd=tmp_path, check=True)
    words = [*SMALL, f"data.path={digits}", "run.dir=run", "train.precision=bf16"]
    done = subprocess.run(
        [sys.executable, "-c", STARTS, *words],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    old, far, second, turing, alone, bare = json.loads(done.stdout.splitlines()[-1])
    assert [(code, joined) for code, _, joined in (old, far, second, turing, alone, bare)] == [(64, False)] * 6
    assert "error: device auto: the NVIDIA driver runs CUDA 12.4 at most, and torch" in old[1]
    for said in far[1], second[1]:  # no verdict of rank 0 says that another rank of the node prints it
        assert (
            f"error on {os.uname().nodename} rank 9: device auto: the NVIDIA driver" in said and said.count("\n") == 1
        )
    assert "error: GPU 0 is sm_75, and train.precision=bf16 needs sm_80" in turing[1]
    assert "for CUDA 13.0 has no NCCL" in alone[1]
    assert "error: alignment.kernel=auto: Triton needs a C compiler" in bare[1]
    assert all("Traceback" not in said for _, said, _ in (old, far, second, turing, alone))
    assert not (tmp_path / "run").exists()
