"""Runs the small cases in Triton's interpreter and prints one JSON line a case. A process of its own: see conftest.py.

TRITON_INTERPRET=1 python tests/kernels/interpreted.py
"""

import json
import sys
import time
import traceback
import warnings

import torch
from kernel_cases import small_cases
from repa_scale.kernels import table

LAUNCHES = set()


def recorded(kernel, grid, arguments, constants, warps):
    """Every start of a kernel: name, dtypes of its pointers, tile, warps. The test compares them with what is built."""
    dtypes = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    pointers = tuple(dtypes[a.dtype] for a in arguments if isinstance(a, torch.Tensor))
    LAUNCHES.add((kernel.fn.__name__, pointers, constants.get("ROWS", 1), constants["COLUMNS"], warps))
    return START(kernel, grid, arguments, constants, warps)


START, table.start = table.start, recorded
warnings.filterwarnings("ignore")
for name, case in small_cases().items():
    began = time.perf_counter()
    try:
        case(device="cpu")
        problem = ""
    except Exception:
        problem = traceback.format_exc()
    print(json.dumps({"case": name, "problem": problem, "seconds": time.perf_counter() - began}), flush=True)
print(json.dumps({"launches": sorted(LAUNCHES)}))
sys.exit(0)
