"""What needs a GPU: every case at every size, 20 equal runs, and training with and without the kernels."""

import pytest
import torch
from kernel_cases import check_compile, check_repeats, large_cases, small_cases
from training_loop import curve

pytestmark = pytest.mark.gpu
CASES = {**small_cases(), **large_cases()}


@pytest.fixture(autouse=True)
def exact_products():
    """Products in fp32 are compared with float64, so TF32 stays off."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    CASES[case](device="cuda")


def test_twenty_runs_give_the_same_bits():
    check_repeats("cuda", times=20)


def test_compiled_by_inductor():
    check_compile("cuda", backend="inductor")


@pytest.mark.timeout(580)
@pytest.mark.parametrize("setting", ["plain", "checkpointing", "compile"])
def test_training_with_and_without_the_kernels(setting):
    """ZeRO-3 on one rank, bf16: the first step within rounding, 200 steps whose curves coincide within their noise."""
    pytest.importorskip("deepspeed")
    fused, plain = (
        curve(kernel, "cuda", steps=200, precision="bf16", **({setting: True} if setting != "plain" else {}))
        for kernel in ("triton", "torch")
    )
    assert abs(fused[0] - plain[0]) < 2e-3 * abs(plain[0])
    last = slice(100, None)
    noise = plain[last].std()  # from batch to batch; both runs see the same batches
    assert abs(fused[last].mean() - plain[last].mean()) < 0.1 * noise
    assert plain[last].mean() < plain[:20].mean(), "nothing was learnt, so nothing was compared"
