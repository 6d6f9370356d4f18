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


def data_sheet() -> Gpu | None:
    """The row of this GPU; None where there is none."""
    return next((row for name, row in GPUS.items() if name in device_name()), None)


def product_flops(device: torch.device, benchmark: str) -> float:
    """Floating-point operations per second of a bf16 matrix product.

    Under BENCHMARK_OUT the first process measures it and the others take it from its rows, so that all shares of one
    program run have the same denominator.

    Args:
        benchmark: whose rows hold it, as `product_flops_per_second`.
    """
    return _kept(benchmark) or _measured(device)


def _kept(benchmark: str) -> float | None:
    file = results_folder() / f"{benchmark}.jsonl"
    if not os.environ.get("BENCHMARK_OUT") or not file.exists():
        return None
    rows = map(json.loads, file.read_text().splitlines())
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
