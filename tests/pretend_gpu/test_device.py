"""The pretend device is as strict as a GPU where the runs rely on it."""

import json
import subprocess
import sys

import pytest

from pretend_gpu.launch import environment_of_child

pytestmark = pytest.mark.long

PROBE = """
import json, subprocess, sys
from pretend_gpu import start
start.install(sys.argv[1])
from pathlib import Path
from pretend_gpu import record
record.install()
import torch
from torch.utils import cpp_extension

x = torch.arange(12.0, device="cuda").view(3, 4)
host, number = torch.ones(3, 4), torch.tensor(2.0)
mixed = {
    "add": lambda: x + host,
    "matmul": lambda: x @ torch.ones(4, 2),
    "cat": lambda: torch.cat([x, host]),
    "stack of scalars": lambda: torch.stack([x.mean(), number]),
    "linear": lambda: torch.nn.functional.linear(x, host),
    "where": lambda: torch.where(x > 1, x, host),
    "embedding": lambda: torch.nn.functional.embedding(torch.tensor([1]), x),
    "fused adam": lambda: torch._fused_adamw_([x], [x], [x], [x], [], [number], lr=1.0, beta1=0.9, beta2=0.9,
        weight_decay=0.0, eps=1.0, amsgrad=False, maximize=False),
}
found = {}
for name, call in mixed.items():
    try:
        found[name] = f"came to {call()}"
    except RuntimeError as error:
        found[name] = "refused" if "Expected all tensors to be on the same device" in str(error) else str(error)
try:
    cpp_extension.load(name="op", sources=[])
    found["jit"] = "built"
except RuntimeError as error:
    found["jit"] = str(error)
subprocess.run(["true"])
record.write(Path(sys.argv[2]))
linear = torch.nn.Linear(4, 2, device="cuda", dtype=torch.bfloat16)
linear(x.bfloat16()).square().mean().backward()
found |= {
    "allowed": [(x + number).sum().item(), x[torch.tensor([1])].sum().item(), x.cpu().sum().item()],
    "devices": sorted({str(t.device) for t in (x, x.T @ x, linear.weight, linear.weight.grad)}),
    "fresh memory": torch.empty(3, device="cuda").isnan().all().item(),
    "pinned": [host.pin_memory().is_pinned(), host.is_pinned()],
}
print(json.dumps(found))
"""


def test_it_is_as_strict_as_a_gpu(gpu, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, gpu.library, tmp_path / "record"],
        env=environment_of_child(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("allowed") == [66.0 + 24.0, 22.0, 66.0], "what CUDA forgives"
    assert found.pop("devices") == ["cuda:0"]
    assert found.pop("fresh memory"), "a read before the first write gives NaN"
    assert found.pop("pinned") == [True, False]
    assert "a JIT build of op" in found.pop("jit")
    assert json.loads((tmp_path / "record").read_text())["programs"] == ["true"]
    assert set(found.values()) == {"refused"}, found
