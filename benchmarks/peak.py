"""What the device can do at most: the data sheet's rates, and a matrix product measured once for all processes."""

from __future__ import annotations

import json
import os
import statistics
import time

import torch

from benchmarks.rows import device_name, results_folder
from repa_scale.plan.cluster import GPUS, Gpu

SIDE = {"cuda": 8192, "cpu": 512}
CALLS = 20
KEPT_IN = ("train_throughput", "kernels")  # whose rows have `product_flops_per_second`


def data_sheet() -> Gpu | None:
    """The row of this GPU; None where there is none."""
    return next((row for name, row in GPUS.items() if name in device_name()), None)


def product_flops(device: torch.device) -> float:
    """Floating-point operations per second of a bf16 matrix product.

    Under BENCHMARK_OUT the first process measures it, and those that follow take it from its row there, so that all
    shares of a whole run of benchmarks have the same denominator.
    """
    return _kept() or _measured(device)


def _kept() -> float | None:
    if not os.environ.get("BENCHMARK_OUT"):
        return None
    files = [results_folder() / f"{name}.jsonl" for name in KEPT_IN]
    rows = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    found = (row.get("product_flops_per_second") for row in rows if row["device"] == device_name())
    return next((value for value in found if value), None)


def _measured(device: torch.device) -> float:
    """The median of CALLS products of square matrices of random values, after as many to warm up."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for number in range(2 * CALLS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.mm(a, b, out=out)
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end) / 1e3
        else:
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            took = time.perf_counter() - began
        if number >= CALLS:
            seconds.append(took)
    del a, b, out
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2 * side**3 / statistics.median(seconds)
