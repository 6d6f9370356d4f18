#!/usr/bin/env bash
# Makes the virtual environment of a checkout with everything in it, at the versions of constraints.txt.
#
#   PYTHON=python3.12 VENV=.venv launchers/local/setup.sh
#
# TORCH_INDEX may name an index of CPU or other CUDA builds of torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}

if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'; then
    echo "setup: $python is $("$python" -V); repa_scale needs Python 3.10 to 3.13. Choose one: make setup PYTHON=python3.12" >&2
    exit 64
fi
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install --quiet -c constraints.txt "$@"; }
pip --upgrade 'pip>=25' 'setuptools>=77,<81' wheel ninja packaging py-cpuinfo

# torch first and alone, because DeepSpeed's set-up imports it. torchvision without its dependencies: its package asks
# for a CUDA build of torch even where a CPU build is installed.
pip ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch numpy
pip --no-deps torchvision
# A CUDA build of torch has brought this very version. A CPU build brings none; beside it Triton runs the kernels in its
# interpreter, for their tests.
pip --no-deps triton
# DeepSpeed is pure Python here: a run uses none of its compiled operators. Its set-up fails on a machine with a GPU and no
# CUDA toolkit unless it is told to build for a CPU; the accelerator is found when it is imported, so the wheel is the same.
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip --no-build-isolation --no-deps deepspeed
pip --prefer-binary -e '.[all,dev]'
