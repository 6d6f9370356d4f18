"""The kernels against eager torch, the public code's loop, torch.compile and a plain copy: time, bandwidth, memory.

    python -m benchmarks.kernels --rows 65536 --widths 768 1536      on a GPU, within a minute
    python -m benchmarks.kernels                                     all sizes; without a GPU the plain forms, small
    python -m benchmarks.kernels --counted                           bytes and peak memory, counted without running

Buffers are rotated through more than the L2 cache, and bandwidth is a share of what a copy reaches in the same run.
Each competitor is one row. One that the host bounds says so: its time is the host's, not the kernel's.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from repa_scale.kernels import unavailable
from torch import Tensor

from benchmarks.command import Parser, answered, positive, put_row
from benchmarks.counted_memory import projector_step
from benchmarks.graphs import compiled_graphs
from benchmarks.kernel_subjects import COMPILED, HEAD, PRODUCTS, TOKENS, compiled, subject
from benchmarks.kernel_timing import ROTATED, Work, copy_bandwidth, peak_bytes, run, timed
from benchmarks.peak import product_flops
from benchmarks.rows import device_name
from repa_scale.errors import ConfigError, reason

NAME = "kernels"
# of 65,536 rows: share of the copy's bandwidth, times faster than eager, than the public loop, than torch.compile
GOALS = {
    "cosine": {"bandwidth": 0.85, "eager": 8.0, "public loop": 20.0, COMPILED: 0.95},
    "layernorm": {"bandwidth": 0.85, "eager": 4.0, COMPILED: 1.2},
    "spatial": {"bandwidth": 0.80, "eager": 6.0, COMPILED: 1.2},
    "projector": {PRODUCTS: 0.80, "eager": 1.25, COMPILED: 0.97},
}
MEMORY_GOALS = {"projector": {"eager": 0.40, COMPILED: 0.50}}
EACH = 0.3  # seconds that one competitor is timed, forward and again forward and backward
FIRST_COMPILATION = 8.0  # seconds that the first one is expected to take


@dataclass
class Budget:
    """When the program should end, and how long the last compilation took."""

    until: float
    compilation: float = FIRST_COMPILATION

    def over(self, who: str) -> bool:
        """Whether there is no time left for this competitor."""
        return time.perf_counter() + 2 * EACH + (self.compilation if who == COMPILED else 0.0) > self.until


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.prog = NAME
    parser.add_argument("--rows", type=positive, nargs="+", help="multiples of 256; default 8192 65536")
    parser.add_argument("--widths", type=positive, nargs="+", help="channels; default 384 768 1024 1536")
    parser.add_argument("--only", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--rounds", type=positive, help="at most; default 20")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time budget; cases that do not fit are marked")
    parser.add_argument("--counted", action="store_true", help="count bytes and memory too (always without a GPU)")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available() and not args.rehearse
    args.rows = args.rows or ([8192, 65536] if cuda else [512])
    args.widths = args.widths or ([384, 768, 1024, 1536] if cuda else [64] if args.rehearse else [768])
    args.rounds = args.rounds or (20 if cuda else 3)
    args.device = torch.device("cuda" if cuda else "cpu")
    return answered(lambda: measure(args))


def measure(args) -> int:
    if odd := [rows for rows in args.rows if rows % TOKENS]:
        raise ConfigError(f"--rows {odd[0]} is not a multiple of {TOKENS}, the tokens of an image; use {TOKENS * 32}")
    budget = Budget(time.perf_counter() + args.seconds)
    copy = copy_bandwidth(args.device, args.rounds)
    limits = {"copy_bytes_per_second": copy, "product_flops_per_second": product_flops(args.device)}
    print(f"{device_name()}: a copy moves {copy / 1e9:.0f} GB/s")
    if problem := unavailable(args.device):
        print(f"the kernels are not timed: {problem}")
    rows = []
    for kernel in args.only:
        for count in args.rows:
            for width in args.widths:
                rows += measured(kernel, count, width, args, limits, budget)
    verdict(rows, args.device.type == "cuda")
    if args.counted or (args.device.type == "cpu" and not args.rehearse):
        counted = {"projector_peak_bytes": counted_memory(), "bytes_a_row": counted_bytes()}
        put_row(NAME, {"case": "counted", **counted}, args.rehearse)
    if failed := [row["case"] for row in rows if row.get("failed")]:
        print(f"torch.compile did not do what was asked: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def measured(
    kernel: str, count: int, width: int, args, limits: dict[str, float], budget: Budget
) -> list[dict[str, Any]]:
    """A row for each competitor, written as soon as it is measured: the passes in turn, the same inputs for all."""
    device = args.device
    what = subject(kernel, count, width, device, (64, 128) if args.rehearse else HEAD)
    inputs = [what.build() for _ in range(max(2, math.ceil(ROTATED / what.bytes)) if device.type == "cuda" else 1)]
    limit = max(what.bytes / limits["copy_bytes_per_second"], what.flops / limits["product_flops_per_second"])
    case = {"kernel": kernel, "rows": count, "width": width}
    found = []
    for who, work in what.works.items():
        row = {"case": f"{kernel} {count} x {width}, {who}", **case, "who": who}
        row |= competitor(who, work, inputs, args, budget)
        row |= {"bytes": what.bytes, "flops": what.flops, "limit_seconds": limit, **limits}
        if "seconds" in row and kernel != "projector":  # which computes more than it moves
            row["bandwidth"] = what.bytes / row["seconds"] / limits["copy_bytes_per_second"]
        put_row(NAME, row, args.rehearse)
        print(line(row), flush=True)
        found.append(row)
    return found


def competitor(who: str, work: Work, inputs: list[dict[str, Tensor]], args, budget: Budget) -> dict[str, Any]:
    """Seconds and peak memory of one competitor, or `not_measured` with the reason."""
    device, row = args.device, {}
    if who.startswith("ours") and (problem := unavailable(device)):
        return {"not_measured": problem}
    if budget.over(who):
        return {"not_measured": f"--seconds {args.seconds:g} are over"}
    if who == COMPILED:
        before, began = compiled_graphs(), time.perf_counter()
        work = compiled(work, "aot_eager" if args.rehearse else "inductor")
        try:
            run(work, inputs[0], True)
        except Exception as error:  # Dynamo, Inductor and Triton raise their own
            return {"not_measured": f"torch.compile failed: {reason(error)}", "failed": True}
        budget.compilation = row["compile_seconds"] = time.perf_counter() - began
        row["graphs"] = compiled_graphs() - before
    forward = timed(work, inputs, device, args.rounds, False, EACH)
    with_gradient = inputs[0]["x"].requires_grad and who != PRODUCTS
    both = timed(work, inputs, device, args.rounds, True, EACH) if with_gradient else forward
    row |= {"forward_seconds": forward.seconds, **asdict(both)}
    if who == COMPILED:
        row["recompiled"] = compiled_graphs() - before - row["graphs"]
        if not row["graphs"] or row["recompiled"]:
            row["failed"] = True
    if device.type == "cuda":
        row["peak_bytes"] = peak_bytes(lambda: run(work, inputs[0], True), device)
    return row


def line(row: dict[str, Any]) -> str:
    """One competitor, printed."""
    head = f"{row['kernel']:10s} {row['rows']:6d} x {row['width']:4d}  {row['who']:22s}"
    if "not_measured" in row:
        return f"{head} not measured: {row['not_measured']}"
    host, limit = 1e3 * row["host_seconds"], 1e3 * row["limit_seconds"]
    text = f"{head} {1e3 * row['seconds']:9.3f} ms (host {host:.3f}, limit {limit:.3f})"
    text += ", host-bound" if row["host_bound"] else ""
    text += f", extra memory {row['peak_bytes'] / 1e6:.1f} MB" if "peak_bytes" in row else ""
    text += f", compiled in {row['compile_seconds']:.1f} s: {row['graphs']} graphs" if "graphs" in row else ""
    return text + (f", recompiled {row['recompiled']} times" if row.get("recompiled") else "")


def counted_memory() -> list[dict]:
    """The projector's peak for each way and number of rows, counted without running it (counted_memory.py)."""
    rows = []
    for count in (8192, 65536):
        ways = {"eager": ("torch", None), "ours": ("triton", None), "ours, chunks of 8192": ("triton", 8192)}
        sizes = (*HEAD, 768)
        found = {who: projector_step(kernel, count, sizes, chunk) for who, (kernel, chunk) in ways.items()}
        for who, peak in found.items():
            rows.append({"rows": count, "who": who, "bytes": peak, "of_eager": peak / found["eager"]})
            share = f"{peak / found['eager']:.2f} of eager's"
            print(f"projector  {count:6d} x  768  {who:22s} counted peak {peak / 1e6:7.1f} MB, {share}")
    return rows


def counted_bytes() -> list[dict]:
    """Bytes a row of the bf16 kernels, from the code that the compiler makes for sm_90."""
    command = [sys.executable, "-m", "repa_scale.kernels.report", "--json", "--architectures", "90"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [row for row in map(json.loads, lines) if row["dtypes"] in ("bf16-bf16", "bf16")]
    for row in rows:
        print(f"{row['kernel']:16s} z={row['z']:<5d} {row['bytes_a_row']:>8s} bytes a row, counted")
    return rows


def verdict(rows: list[dict[str, Any]], cuda: bool) -> None:
    """Each goal against the figures; what was not measured is said."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["kernel"], row["rows"], row["width"]), {})[row["who"]] = row
    for (kernel, count, width), by in cases.items():
        case, ours = f"{kernel} {count} x {width}", by["ours"]
        for other, goal in GOALS[kernel].items():
            theirs = ours if other == "bandwidth" else by[other]
            if not cuda or "not_measured" in ours or "not_measured" in theirs:
                print(f"{case}: {other}, goal {goal}: not measured")
            elif other == "bandwidth":
                print(f"{case}: {ours['bandwidth']:.2f} of the copy's bandwidth (goal {goal} at 65,536 rows)")
            else:
                bound = ", which the host bounds" if theirs["host_bound"] else ""
                times = theirs["seconds"] / ours["seconds"]
                print(f"{case}: {times:.2f} times as fast as {other}{bound} (goal {goal} at 65,536 rows)")
        for other, goal in MEMORY_GOALS.get(kernel, {}).items():
            for who, row in by.items():
                if who.startswith("ours") and "peak_bytes" in row and "peak_bytes" in by[other]:
                    share = row["peak_bytes"] / by[other]["peak_bytes"]
                    print(f"{case}: memory of {who} is {share:.2f} of {other}'s (goal {goal} at 65,536 rows)")


if __name__ == "__main__":
    sys.exit(main())
