"""A real training run with the kernels in Triton's interpreter equals the run in plain torch (ZeRO-3, two ranks)."""

import pytest
from launching import SMALL, Launch, assert_close, end_all, train

pytestmark = pytest.mark.distributed
# Both terms of an encoder without a norm to fuse; one projector fused, one convolution; both normalisations.
WORDS = (
    *SMALL,
    "train.steps=3",
    "alignment.repa.normalize=layernorm",
    "alignment.conv.encoder=effnet-lite0",
    "alignment.conv.weights=package",
    "alignment.conv.depth=2",
    "alignment.conv.projector=conv",
    "alignment.conv.normalize=spatial",
)


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    end_all()


def test_triton_equals_torch_within_1e_5(digits, tmp_path):
    words = [*WORDS, f"data.path={digits}"]
    plain = train([*words, "alignment.kernel=torch"], tmp_path / "torch", 2)
    fused = train([*words, "alignment.kernel=triton"], tmp_path / "triton", 2, TRITON_INTERPRET="1")
    assert len(fused) == 3
    assert_close(fused, plain, 1e-5)
    assert fused != plain and any(a["alignment_loss"] != b["alignment_loss"] for a, b in zip(fused, plain, strict=True))
    largest = {
        key: max(abs(a[key] / b[key] - 1) for a, b in zip(fused, plain, strict=True))
        for key in ("loss", "alignment_loss", "grad_norm")
    }
    print(f"largest relative differences: {largest}")


def test_triton_on_a_cpu_without_the_interpreter_is_one_line(digits, tmp_path):
    launch = Launch([*WORDS, f"data.path={digits}", "alignment.kernel=triton"], tmp_path / "run", 1, "alone")
    assert launch.wait() == 64
    assert "alignment.kernel=triton: a CPU runs it in Triton's interpreter alone" in launch.text()
    assert "Traceback" not in launch.text()
