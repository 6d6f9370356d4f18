#!/usr/bin/env bash
# Every GPU test and GPU benchmark, in pieces of under 10 minutes, on a machine that has torch, timm and triton alone.
#
#   benchmarks/gpu.sh all                  one piece after the other
#   benchmarks/gpu.sh tests|training|kernels|tuning|step|throughput|memory
#
# DeepSpeed is taken from DEEPSPEED_WHEEL if it is not installed; PUBLIC_REPA may name a checkout of the public code.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
piece() { echo "== $1"; timeout 590 "${@:2}"; }

if ! "$python" -c 'import deepspeed' 2>/dev/null; then
    if [ -z "${DEEPSPEED_WHEEL:-}" ]; then
        echo "gpu: DeepSpeed is not installed; install it, or set DEEPSPEED_WHEEL=path/to/deepspeed.whl" >&2
        exit 64
    fi
    "$python" -m pip install --quiet --no-deps --no-index "$DEEPSPEED_WHEEL"
fi
"$python" -m pip install --quiet --no-deps --no-build-isolation -e . 2>/dev/null || true

case ${1:-all} in
tests) piece tests "$python" -m pytest -q -m gpu tests --deselect tests/kernels/test_on_gpu.py::test_training_with_and_without_the_kernels ;;
training)
    for setting in plain checkpointing compile; do
        piece "training $setting" "$python" -m pytest -q -m gpu tests/kernels/test_on_gpu.py -k "training and $setting"
    done
    ;;
kernels)
    piece report "$python" -m repa_scale.kernels.report
    for kernel in cosine layernorm spatial projector; do
        piece "kernels $kernel" "$python" -m benchmarks.kernels --only "$kernel"
    done
    ;;
tuning) piece tuning "$python" -m benchmarks.kernel_tuning ;;
step)
    piece rng "$python" -m benchmarks.rng --device cuda
    piece step_overhead "$python" -m benchmarks.step_overhead --device cuda --rounds 20
    ;;
throughput)
    for batch in 32 64 128; do
        piece "throughput $batch" "$python" -m benchmarks.train_throughput --batch "$batch" ${PUBLIC_REPA:+--public "$PUBLIC_REPA"}
    done
    ;;
memory) piece memory "$python" -m benchmarks.zero_memory --processes 1 ;;
all) for part in tests training kernels tuning step throughput memory; do "$0" "$part"; done ;;
*)
    echo "gpu: unknown piece $1; known: all, tests, training, kernels, tuning, step, throughput, memory" >&2
    exit 64
    ;;
esac
