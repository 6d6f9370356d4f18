"""What needs a GPU: every case at every size, 20 equal runs, and training with and without the kernels.

A rehearsal (conftest.py) runs a few of them on the CPU, in Triton's interpreter.
"""

import os

import pytest
import torch
from autograd_cases import check_compile
from kernel_cases import check_repeats, large_cases, small_cases
from training_loop import curve

pytestmark = pytest.mark.gpu
REHEARSAL = os.environ.get("REPA_SCALE_REHEARSE") == "1"
CASES = small_cases() if REHEARSAL else {**large_cases(), **small_cases()}  # the longest first
SETTINGS = ["plain", "checkpointing", "compile"]
if REHEARSAL:
    CASES = dict(list(CASES.items())[::15])
    SETTINGS.remove("compile")


@pytest.fixture(autouse=True)
def exact_products():
    """Products in fp32 are compared with float64, so TF32 stays off, in the convolutions of an encoder too."""
    homes = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [home.allow_tf32 for home in homes]
    for home in homes:
        home.allow_tf32 = False
    yield
    for home, value in zip(homes, before, strict=True):
        home.allow_tf32 = value


@pytest.mark.parametrize("case", CASES)
def test_case(case, gpu):
    CASES[case](device=gpu)


def test_twenty_runs_give_the_same_bits(gpu):
    check_repeats(gpu, times=2 if REHEARSAL else 20)


def test_compiled_by_inductor(gpu):
    check_compile(gpu, backend="aot_eager" if REHEARSAL else "inductor")  # which takes minutes for a CPU


@pytest.mark.timeout(580)
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_with_and_without_the_kernels(setting, gpu):
    """ZeRO-3 on one rank, bf16: the first step within rounding, 200 steps whose curves coincide within their noise."""
    pytest.importorskip("deepspeed")
    size = {"steps": 2, "model": "SiT-Nano/8", "batch": 2} if REHEARSAL else {"steps": 200}
    fused, plain = (
        curve(kernel, gpu, precision="bf16", **size, **({setting: True} if setting != "plain" else {}))
        for kernel in ("triton", "torch")
    )
    assert abs(fused[0] - plain[0]) < 2e-3 * abs(plain[0])
    if REHEARSAL:  # too short for statistics
        return
    last = slice(100, None)
    noise = plain[last].std()  # from batch to batch; both runs see the same batches
    assert abs(fused[last].mean() - plain[last].mean()) < 0.1 * noise
    assert plain[last].mean() < plain[:20].mean(), "nothing was learnt, so nothing was compared"
