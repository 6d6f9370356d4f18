#!/usr/bin/env bash
# What a GPU says about this code within a time budget: are the kernels right, does training match the CPU, how fast is
# a step and where does its time go. Needs torch, Triton, timm and pytest; the machine may be offline (docs/gpu.md).
#
#   benchmarks/gpu.sh --seconds 560 --out DIR [--wheels DIR] [--public DIR] [--rehearse] [PIECE ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The caller's folder stays out of sys.path (Python 3.11 and later), and no bytecode is written beside the sources.
PYTHONPATH=$root PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
