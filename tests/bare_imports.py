"""Run by test_gpu_program.py: every program of every piece answers --help, and every GPU test is collected, without the
packages that a GPU machine lacks."""

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bare  # noqa: E402

bare.hide(bare.absent())

from benchmarks.pieces import pieces  # noqa: E402

programs = sorted({piece.command[1] for piece in pieces(None)} - {"pytest"})
for name in (*programs, "benchmarks.truth_run", "benchmarks.collect"):
    sys.argv = [name, "--help"]
    try:
        importlib.import_module(name).main()
    except SystemExit as ended:
        assert ended.code in (0, None), name
    else:
        raise AssertionError(f"{name} did not answer --help")
    print(f"helped: {name}")

import deepspeed  # noqa: E402, F401
import pytest  # noqa: E402

os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # packages that are hidden bring some
plugins = ["-p", "xdist.plugin", "-p", "pytest_timeout", "-p", "no:cacheprovider"]
gpu_tests = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", *plugins, f"--rootdir={ROOT}", *gpu_tests]))
