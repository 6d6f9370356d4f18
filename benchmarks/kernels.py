"""The kernels against eager torch, the public code's loop, torch.compile and a plain copy: time, bandwidth, memory.

    python -m benchmarks.kernels                    on a GPU: 8,192 and 65,536 rows, widths 384 to 1,536, bf16
    python -m benchmarks.kernels                    without one: the plain forms, small, and what can be counted
    python -m benchmarks.kernels --only projector --rows 65536

Buffers are rotated through more than the L2 cache, and bandwidth is a share of what a copy reaches in the same run.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from repa_scale.kernels import cosine_loss, normalize_tokens, projector_cosine_loss
from torch import Tensor, nn

from benchmarks.counted_memory import projector_step
from benchmarks.kernel_plot import bars
from benchmarks.rows import RESULTS, device_name, write_row

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32  # a CPU multiplies bf16 slowly
TOKENS, DEPTH_WIDTH, INNER = 256, 1152, 2048  # an image's tokens; the transformer's and the projector's width (XL)
ROTATED = 512 << 20  # bytes that are gone through before a buffer comes again; the largest L2 has 50 MB
CALLS = 20
# of 65,536 rows: share of the copy's bandwidth, times faster than eager, than the public loop, than torch.compile
GOALS = {
    "cosine": {"bandwidth": 0.85, "eager": 8.0, "public loop": 20.0, "compile": 0.95},
    "layernorm": {"bandwidth": 0.85, "eager": 4.0, "compile": 1.2},
    "spatial": {"bandwidth": 0.80, "eager": 6.0, "compile": 1.2},
    "projector": {"matrix products alone": 0.80, "eager": 1.25, "compile": 0.97},
}
MEMORY_GOALS = {"projector": {"eager": 0.40, "compile": 0.50}}
Work = Callable[[dict[str, Tensor]], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 65536] if CUDA else [512])
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768, 1024, 1536] if CUDA else [768])
    parser.add_argument("--only", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--rounds", type=int, default=20 if CUDA else 3)
    args = parser.parse_args()
    device = torch.device("cuda" if CUDA else "cpu")
    copy = copy_bandwidth(device, args.rounds)
    print(f"{device_name()}: a copy moves {copy / 1e9:.0f} GB/s")
    if not CUDA:
        print("no GPU: times are of the plain forms in fp32 on this CPU; the kernels are not timed")
    rows = []
    for kernel in args.only:
        for count in args.rows:
            for width in args.widths:
                rows += measured(kernel, count, width, device, copy, args.rounds)
    counted = {"projector_peak_bytes": counted_memory(), "bytes_a_row": counted_bytes()}
    write_row("kernels", {"copy_bytes_per_second": copy, "goals": GOALS, "rows": rows, "counted": counted})
    part = "" if len(args.only) == len(GOALS) else "-".join(["", *args.only])
    name = "kernels-" + "".join(c if c.isalnum() else "_" for c in device_name()) + part
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (RESULTS / f"{name}.svg").write_text(bars(rows, device_name()))
    verdict(rows)


def measured(kernel: str, rows: int, width: int, device: torch.device, copy: float, rounds: int) -> list[dict]:
    """A row for each competitor: the passes in turn, the same inputs for all."""
    least, build, works = subject(kernel, rows, width, device)
    inputs = [build() for _ in range(max(2, math.ceil(ROTATED / least)) if CUDA else 1)]
    found = []
    for name, work in works.items():
        ours = name.startswith("ours")
        row = {"kernel": kernel, "rows": rows, "width": width, "who": name, "bytes": least}
        row |= dict.fromkeys(("seconds", "forward_seconds", "host_seconds", "bandwidth", "peak_bytes"), "")
        if CUDA or not ours:
            row["forward_seconds"], _ = timed(work, inputs, device, rounds, backward=False)
            row["seconds"], row["host_seconds"] = timed(work, inputs, device, rounds, backward=True)
            if kernel != "projector":  # which computes more than it moves
                row["bandwidth"] = least / row["seconds"] / copy
        if CUDA:
            row["peak_bytes"] = peak_bytes(lambda work=work: run(work, inputs[0], True), device)
        found.append(row)
        shown = (
            f"{1e3 * row['seconds']:9.3f} ms (host {1e3 * row['host_seconds']:.3f})" if row["seconds"] else "not timed"
        )
        memory = f", extra memory {row['peak_bytes'] / 1e6:.1f} MB" if CUDA else ""
        print(f"{kernel:10s} {rows:6d} x {width:4d}  {name:22s} {shown}{memory}", flush=True)
    return found


def subject(
    kernel: str, rows: int, width: int, device: torch.device
) -> tuple[int, Callable[[], dict[str, Tensor]], dict[str, Work]]:
    """Bytes that must move (forward and backward), a maker of inputs, and the competitors."""
    images, dtype = rows // TOKENS, DTYPE

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    if kernel == "cosine":
        return (
            rows * (5 * DTYPE.itemsize * width + 32),
            lambda: {"x": normal(images, TOKENS, width).requires_grad_(), "y": normal(images, TOKENS, width)},
            {
                "ours": lambda i: cosine_loss(i["x"], i["y"], kernel="triton"),
                "eager": lambda i: cosine_loss(i["x"], i["y"], kernel="torch"),
                "public loop": public_loop,
                "compile": compiled(lambda i: cosine_loss(i["x"], i["y"], kernel="torch")),
            },
        )
    if kernel in ("layernorm", "spatial"):
        affine = (torch.randn(width, device=device), torch.randn(width, device=device))
        settings = {
            "kind": kernel,
            "prefix": 1,
            "out_dtype": dtype,
            "affine": affine if kernel == "layernorm" else None,
        }
        works: dict[str, Work] = {
            "ours": lambda i: normalize_tokens(i["x"], **settings, kernel="triton"),
            "eager": lambda i: normalize_tokens(i["x"], **settings, kernel="torch"),
            "compile": compiled(lambda i: normalize_tokens(i["x"], **settings, kernel="torch")),
        }
        if kernel == "layernorm" and CUDA and importlib.util.find_spec("liger_kernel"):
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction as Liger

            works["Liger, then a slice"] = lambda i: Liger.apply(i["x"], *affine, 1e-6)[:, 1:].contiguous()
        return rows * width * 2 * DTYPE.itemsize, lambda: {"x": normal(images, 1 + TOKENS, width)}, works
    torch.manual_seed(0)
    sizes = ((DEPTH_WIDTH, INNER), (INNER, INNER), (INNER, width))
    linears = [nn.Linear(*size, device=device, dtype=dtype) for size in sizes]
    for parameter in (p for linear in linears for p in linear.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # no sums over calls
    projector = nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])

    def loss(i: dict[str, Tensor], chosen: str, chunk: int | None = None) -> Tensor:
        return projector_cosine_loss(i["x"], projector, i["y"], chunk=chunk, kernel=chosen)

    return (
        rows * 5 * DTYPE.itemsize * width,
        lambda: {"x": normal(images, TOKENS, DEPTH_WIDTH).requires_grad_(), "y": normal(images, TOKENS, width)},
        {
            "ours": lambda i: loss(i, "triton"),
            "ours, chunks of 8192": lambda i: loss(i, "triton", 8192),
            "eager": lambda i: loss(i, "torch"),
            "compile": compiled(lambda i: loss(i, "torch")),
            "matrix products alone": lambda i: products(i["x"].detach().flatten(0, 1), linears),
        },
    )


def compiled(work: Work) -> Work:
    return torch.compile(work, dynamic=False)


def public_loop(i: dict[str, Tensor]) -> Tensor:
    """The alignment loss as the public REPA code computes it: image by image, in fp32."""
    total = torch.zeros((), device=i["x"].device)
    for x, y in zip(i["x"].float(), i["y"].float(), strict=True):
        total = total - (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1).mean()
    return total / len(i["x"])


def products(x: Tensor, linears: list[nn.Linear]) -> Tensor:
    """The nine matrix products of a projector's forward and backward pass, and nothing else."""
    inputs = [x]
    with torch.no_grad():
        for linear in linears:
            inputs.append(torch.addmm(linear.bias, inputs[-1], linear.weight.t()))
        gradient = inputs[-1]
        for linear, before in zip(reversed(linears), reversed(inputs[:-1]), strict=True):
            weight = gradient.t() @ before
            gradient = gradient @ linear.weight
    return weight


def run(work: Work, inputs: dict[str, Tensor], backward: bool) -> None:
    out = work(inputs)
    if backward and out.requires_grad:
        out.backward()
        inputs["x"].grad = None


def timed(
    work: Work, inputs: list[dict[str, Tensor]], device: torch.device, rounds: int, backward: bool
) -> tuple[float, float]:
    """Seconds a call on the device, and on the host until the call comes back: medians."""
    for i in inputs[:3]:
        run(work, i, backward)
    if not CUDA:
        seconds = []
        for number in range(rounds):
            began = time.perf_counter()
            run(work, inputs[number % len(inputs)], backward)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds), statistics.median(seconds)
    torch.cuda.synchronize(device)
    on_device, on_host, turn = [], [], 0
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(40_000_000)  # so that the host is ahead, and the device never waits for it
        begin.record()
        began = time.perf_counter()
        for _ in range(CALLS):
            run(work, inputs[turn % len(inputs)], backward)
            turn += 1
        on_host.append((time.perf_counter() - began) / CALLS)
        end.record()
        torch.cuda.synchronize(device)
        on_device.append(begin.elapsed_time(end) / 1e3 / CALLS)
    return statistics.median(on_device), statistics.median(on_host)


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes per second, read and written, of one large copy."""
    source = torch.ones(ROTATED // 4 if CUDA else 16 << 20, device=device)
    target = torch.empty_like(source)
    seconds, _ = timed(lambda i: i["y"].copy_(i["x"]), [{"x": source, "y": target}], device, rounds, backward=False)
    return 2 * source.numel() * source.element_size() / seconds


def peak_bytes(call: Callable[[], None], device: torch.device) -> int:
    """The most bytes that one call has allocated at a time, beyond its inputs."""
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def counted_memory() -> list[dict]:
    """The projector's peak for each way and number of rows, counted without running it (counted_memory.py)."""
    rows = []
    for count in (8192, 65536):
        ways = {"eager": ("torch", 0), "ours": ("triton", 0), "ours, chunks of 8192": ("triton", 8192)}
        sizes = (DEPTH_WIDTH, INNER, 768)
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


def verdict(rows: list[dict]) -> None:
    """Each goal against the figures; what was not measured is said."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["kernel"], row["rows"], row["width"]), {})[row["who"]] = row
    for (kernel, count, width), by in cases.items():
        case = f"{kernel} {count} x {width}"
        for other, goal in GOALS[kernel].items():
            if not CUDA:
                print(f"{case}: {other}, goal {goal}: not measured, there is no GPU")
            elif other == "bandwidth":
                print(f"{case}: {by['ours']['bandwidth']:.2f} of the copy's bandwidth (goal {goal} at 65,536 rows)")
            else:
                times = by[other]["seconds"] / by["ours"]["seconds"]
                print(f"{case}: {times:.2f} times as fast as {other} (goal {goal} at 65,536 rows)")
        for other, goal in MEMORY_GOALS.get(kernel, {}).items() if CUDA else ():
            for who in (name for name in by if name.startswith("ours")):
                share = by[who]["peak_bytes"] / by[other]["peak_bytes"]
                print(f"{case}: memory of {who} is {share:.2f} of {other}'s (goal {goal} at 65,536 rows)")


if __name__ == "__main__":
    main()
