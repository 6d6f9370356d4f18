"""One profiled step of ours: a table by phase, the longest gaps of the GPU, and the trace.

    python -m benchmarks.profile_step --batch 32 --compile

The table counts for each phase the host's time and how much of it is waiting, the device's time and the launches. A gap
is a time without any work on the GPU; beside it stands what the host did meanwhile: the innermost operation or
annotation, such as `ZeRO fetch` or `cudaStreamSynchronize`, or Python between them. The trace (trace.json.gz, for
ui.perfetto.dev) lies beside the row. The profiler slows the host down; the row says how much.

Without a GPU the innermost operations of the CPU stand in for the GPU's work, so the gaps are Python's time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from benchmarks.command import Parser, answered, positive, put_row
from benchmarks.our_step import OurStep, run_config
from benchmarks.rows import results_folder
from benchmarks.timeline import (
    DEVICE,
    as_row,
    busy_share,
    device_spans,
    find_gaps,
    phase_table,
    spans_of,
    window_of,
    write_trace,
)
from repa_scale.ranks import Ranks

NAME = "profile_step"
PHASES = ("draws", "encoder", "latent", "forward", "alignment", "backward", "optimizer", "ema", "record")
# What DeepSpeed does inside them: class -> method -> name.
ZERO = {
    "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator": {
        "fetch_sub_module": "ZeRO fetch",
        "release_sub_module": "ZeRO release",
    },
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": {
        "reduce_independent_p_g_buckets_and_remove_grads": "ZeRO reduce",
        "independent_gradient_partition_epilogue": "ZeRO reduce, the rest",
        "_get_norm_groups": "ZeRO norm",
        "unscale_and_clip_grads": "ZeRO clip",
        "_optimizer_step": "AdamW",
        "_reassign_or_swap_out_partitioned_parameters": "ZeRO weights",
    },
}
WARMUP, PLAIN = 5, 5  # steps before the profiled one: to warm up, and to time without the profiler
GAPS = 20
LIMIT = 16 << 20  # bytes of the trace


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.prog = NAME
    parser.add_argument("--batch", type=positive, default=None, help="images per step; default 32")
    parser.add_argument("--model", default=None, help="default SiT-XL/2")
    parser.add_argument("--encoder", default=None, help="default dinov2-vit-b")
    parser.add_argument("--compile", action="store_true", help="torch.compile, block by block")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    args = parser.parse_args(argv)
    return answered(lambda: run(args))


def run(args) -> int:
    tiny = args.rehearse
    model, encoder = ("SiT-Nano/2", "dinov2-vit-s") if tiny else ("SiT-XL/2", "dinov2-vit-b")
    batch = args.batch or (2 if tiny else 32)
    model, encoder = args.model or model, args.encoder or encoder
    config = run_config(model, encoder, batch, 64 if tiny else 256, args.compile)
    ranks = Ranks.from_environment("cpu" if tiny else args.device)
    ranks.start()
    try:
        step = OurStep(config, ranks, backend="aot_eager" if tiny else "inductor")
        plain = unprofiled(step)
        missing, trace = profiled(step, ranks.device)
        step.close()
    finally:
        ranks.leave()
    spans = spans_of(trace["traceEvents"])
    if ranks.device.type == "cuda" and not any(span.kind in DEVICE for span in spans):
        print("profile_step: the profiler recorded no work of the GPU; is CUPTI installed?", file=sys.stderr)
        return 1
    window = window_of(spans, "step")
    device = device_spans(spans)
    folder = results_folder() if not tiny or os.environ.get("BENCHMARK_OUT") else Path(tempfile.mkdtemp())
    dropped = write_trace(trace, folder / "trace.json.gz", LIMIT)
    row = {
        "case": f"batch {batch}, {model}{', compiled' if args.compile else ''}",
        "step_seconds": plain,
        "profiled_step_seconds": (window[1] - window[0]) / 1e6,
        "timeline": "CPU operations" if ranks.device.type == "cpu" else "GPU",
        "busy_share": busy_share(device, window),
        "phases": phase_table(spans, device, PHASES, window),
        "gaps": [as_row(gap) for gap in find_gaps(device, spans, PHASES, window, GAPS)],
        "dropped_from_trace": dropped,
        "not_annotated": missing,
    }
    put_row(NAME, row, tiny)
    print(report(row, folder / "trace.json.gz"))
    return 0


def unprofiled(step: Callable[[], None]) -> float:
    """Median seconds of a step without the profiler, after warm-up. A step ends with a synchronization of its own."""
    seconds = []
    for number in range(WARMUP + PLAIN):
        began = time.perf_counter()
        step()
        if number >= WARMUP:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def profiled(step: OurStep, device: torch.device) -> tuple[list[str], dict[str, Any]]:
    """Profiles one step, after one that warms the profiler up.

    Returns:
        Which methods of DeepSpeed could not be annotated, and the trace as Chrome reads it.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    once = schedule(wait=0, warmup=1, active=1, repeat=1)
    with annotations(step) as missing, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        with profile(
            activities=activities, schedule=once, on_trace_ready=lambda done: done.export_chrome_trace(str(file))
        ) as profiler:
            for name in ("warm-up", "step"):
                with record_function(name):
                    step()
                profiler.step()
        return missing, json.loads(file.read_text())


@contextlib.contextmanager
def annotations(step: OurStep) -> Iterator[list[str]]:
    """Inside, the trainer's phases and DeepSpeed's methods appear in a profile under their names."""
    trainer, missing = step.trainer, []
    places = [
        ("repa_scale.trainer", "draw", "draws"),
        (trainer.frozen, "targets", "encoder"),
        (trainer.frozen, "clean", "latent"),
        (trainer.engine.ds, "forward", "forward"),
        ("repa_scale.alignment.AlignmentTerm", "loss", "alignment"),
        (trainer.engine, "backward", "backward"),
        (trainer.engine, "step", "optimizer"),
        (trainer.ema, "update", "ema"),
        (trainer, "record", "record"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, label in places:
            owner = _resolved(owner) if isinstance(owner, str) else owner
            stack.enter_context(mock.patch.object(owner, name, _annotated(getattr(owner, name), label)))
        for path, methods in ZERO.items():
            owner = _resolved(path)
            missing += [f"{owner.__name__}.{name}" for name in methods if not hasattr(owner, name)]
            for name in filter(functools.partial(hasattr, owner), methods):
                stack.enter_context(mock.patch.object(owner, name, _annotated(getattr(owner, name), methods[name])))
        yield missing


def _resolved(path: str) -> Any:
    """A module, or a class in one."""
    module, _, last = path.rpartition(".")
    return getattr(importlib.import_module(module), last) if last[0].isupper() else importlib.import_module(path)


def _annotated(function: Callable, label: str) -> Callable:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return run


def report(row: dict[str, Any], trace: Path) -> str:
    """The row as two tables."""
    lines = [
        f"{row['case']}: step {1e3 * row['step_seconds']:.1f} ms, "
        f"profiled {1e3 * row['profiled_step_seconds']:.1f} ms; {row['timeline']} busy {row['busy_share']:.0%} of it",
        f"{'phase':10s} {'host ms':>9s} {'waiting':>9s} {'device ms':>10s} {'launches':>9s}",
    ]
    for name, each in row["phases"].items():
        host, waiting, device = (each[key] / 1e3 for key in ("host_us", "waiting_us", "device_us"))
        lines.append(f"{name:10s} {host:9.2f} {waiting:9.2f} {device:10.2f} {each['launches']:9.0f}")
    lines.append(f"\nthe {len(row['gaps'])} longest gaps: at ms, long us, phase, what the host did")
    for gap in row["gaps"]:
        host = ", ".join(f"{each['what']} {each['us']:.0f}" for each in gap["host"])
        lines.append(f"{gap['start'] / 1e3:9.2f} {gap['length']:9.0f}  {gap['phase']:10s} {host}")
    if row["not_annotated"]:
        lines.append(f"this DeepSpeed has no {', '.join(row['not_annotated'])}: not annotated")
    lines.append(f"trace: {trace}, {trace.stat().st_size / 2**20:.1f} MiB")
    if row["dropped_from_trace"]:
        lines.append(f"  left out, to keep it below {LIMIT >> 20} MiB: {', '.join(row['dropped_from_trace'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
