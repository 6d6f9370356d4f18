"""Images per second of a training step on one GPU, 256 px with DINOv2-B: ours, or the public REPA loop.

One process measures one case, so that neither memory nor shapes of one case touch another's. Images, latent moments and
labels are random and lie on the device: nothing but the step is measured. The public code is not part of this
repository; name a checkout of it.

    python -m benchmarks.train_throughput --way ours --batch 32 --compile
    python -m benchmarks.train_throughput --way public --batch 32 --public path/to/REPA
    python -m benchmarks.train_throughput --way ours --batch 32 --stage 2 --no-overflow-check

Step, host and waiting time come from the same steps (waits.py). Every step ends with the GPU idle, in both ways: the
run's clock synchronizes, and the public loop reads its losses.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any, Protocol

import torch

from benchmarks.command import Parser, answered, positive, put_row
from benchmarks.graphs import compiled_graphs
from benchmarks.our_step import OurStep, run_config
from benchmarks.peak import data_sheet, product_flops
from benchmarks.public_step import PRECISIONS, PublicStep, check
from benchmarks.waits import Waits, unlisted
from repa_scale.config import Config
from repa_scale.flops import training_flops
from repa_scale.plan.times import ELEMENTWISE, OPTIMIZER_BYTES
from repa_scale.ranks import Ranks
from repa_scale.sizes import backbone, token_grid

NAME = "train_throughput"
WARMUP, MORE_WARMUP, LEAST = 5, 20, 5  # steps
OUT_OF_MEMORY = 1  # exit code
# Bytes of memory traffic of the public loop, at least. Per token, channel and block: eager with an fp32 residual. Per
# parameter: clipping 12, Adam 28, EMA 12, the cast of autocast 6.
PUBLIC_ELEMENTWISE, PUBLIC_OPTIMIZER_BYTES = (104, 218), 58
HOST_BOUND = 0.05  # of the step: a step that waits less for the GPU is bound by the host


class Step(Protocol):
    """What is measured: ours or the public one."""

    parameters: int
    phases: dict[str, float]
    skipped: int

    def __call__(self) -> None: ...
    def close(self) -> None: ...


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return answered(lambda: run(args))


def parse(argv: list[str] | None):
    parser = Parser(__doc__)
    parser.prog = NAME
    parser.add_argument("--way", required=True, choices=("ours", "public"))
    parser.add_argument("--batch", type=positive, default=None, help="images per step; default 32")
    parser.add_argument("--model", default=None, help="default SiT-XL/2")
    parser.add_argument("--encoder", default=None, help="default dinov2-vit-b")
    parser.add_argument("--steps", type=positive, default=None, help="measured steps, after 5 of warm-up; default 20")
    parser.add_argument("--seconds", type=float, default=25.0, help="measure no longer than this, but 5 steps")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    ours = parser.add_argument_group("--way ours")
    ours.add_argument("--compile", action="store_true", help="torch.compile, block by block")
    ours.add_argument("--stage", type=int, choices=(1, 2, 3), default=None, help="ZeRO stage; default that of the run")
    ours.add_argument("--no-overflow-check", action="store_true", help="DeepSpeed's bf16.check_grad_overflow off")
    public = parser.add_argument_group("--way public")
    public.add_argument("--public", metavar="DIR", help="a checkout of the public REPA code")
    public.add_argument("--precision", choices=PRECISIONS, default=None, help="default fp16, as its README trains")
    args = parser.parse_args(argv)
    if args.way == "public":
        if args.public is None:
            parser.error("--way public needs --public DIR, a checkout of the public REPA code")
        if args.compile or args.stage or args.no_overflow_check:
            parser.error("--compile, --stage and --no-overflow-check belong to --way ours; leave them out")
    elif args.public or args.precision:
        parser.error("--public and --precision belong to --way public; leave them out")
    if args.no_overflow_check and args.stage != 2:
        # Stage 3 scans in fp16 alone; stage 1 with fp32 gradients has another optimizer, which judges by the norm.
        parser.error("--no-overflow-check changes a bf16 step under stage 2 alone; give --stage 2")
    tiny = args.rehearse
    args.model = args.model or ("SiT-Nano/2" if tiny else "SiT-XL/2")
    args.encoder = args.encoder or ("dinov2-vit-s" if tiny else "dinov2-vit-b")
    args.batch = args.batch or (2 if tiny else 32)
    args.steps = args.steps or (3 if tiny else 20)
    args.image_size = 64 if tiny else 256
    args.precision = args.precision or "fp16"
    return args


def run(args) -> int:
    if args.way == "public":
        check(args.public, args.model, args.encoder, args.rehearse)
    config = run_config(args.model, args.encoder, args.batch, args.image_size, args.compile)
    ranks = Ranks.from_environment("cpu" if args.rehearse else args.device)
    row: dict[str, Any] = {"case": case(args), "way": args.way, "model": args.model, "batch": args.batch}
    ranks.start()
    try:
        row["product_flops_per_second"] = product_flops(ranks.device, NAME)
        step = build(args, config, ranks)
        row |= measure(step, args.steps, args.seconds, args.batch, ranks.device)
        row |= settings(args, step)
        row |= shares(row, config, args.way, step.parameters)
        step.close()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if (problem := shortage(error)) is None:
            raise
        row["error"] = problem
        put_row(NAME, row, args.rehearse)
        print(f"{row['case']}: {problem}", file=sys.stderr)
        return OUT_OF_MEMORY
    finally:
        ranks.leave()
    put_row(NAME, row, args.rehearse)
    print(summary(row))
    if args.compile and not row["graphs"]:
        print("--compile compiled nothing; is TORCHDYNAMO_DISABLE set?", file=sys.stderr)
        return 1
    return 0


def case(args) -> str:
    words = [f"{args.way}, batch {args.batch}"]
    words += [args.model] if args.model != "SiT-XL/2" else []
    words += ["compiled"] if args.compile else []
    words += [f"ZeRO stage {args.stage}"] if args.stage else []
    words += ["no overflow check"] if args.no_overflow_check else []
    words += [args.precision] if args.way == "public" else []
    return ", ".join(words)


def build(args, config: Config, ranks: Ranks) -> Step:
    if args.way == "public":
        return PublicStep(args.public, config, ranks.device, args.precision, args.rehearse)
    backend = "aot_eager" if args.rehearse else "inductor"  # Inductor would call a C++ compiler for minutes
    return OurStep(config, ranks, args.stage, not args.no_overflow_check, backend)


def measure(step: Step, steps: int, seconds: float, batch: int, device: torch.device) -> dict[str, Any]:
    """Medians and spread of `steps` steps after warm-up, fewer when `seconds` are over.

    Returns:
        images_per_second, step_seconds, host_seconds and waiting_seconds (with _p10 and _p90), phases, waits by place,
        memory, and what happened meanwhile that should not: skipped steps, recompilations.
    """
    began = time.perf_counter()
    for number in range(WARMUP + MORE_WARMUP):
        before = step.skipped
        step()
        if number + 1 >= WARMUP and step.skipped == before:  # fp16 finds its loss scale by skipping steps
            break
    synchronize(device)
    warmup = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    skipped, graphs = step.skipped, compiled_graphs()
    samples: dict[str, list[float]] = {"step_seconds": [], "host_seconds": [], "waiting_seconds": []}
    phases, places = [], {}
    with Waits(device) as waits:
        first = time.perf_counter()
        while len(phases) < steps and (len(phases) < LEAST or time.perf_counter() - first < seconds):
            began = time.perf_counter()
            step()
            synchronize(device)  # counts as waiting, as the step's own do
            whole = time.perf_counter() - began
            found = waits.take()
            waiting = min(whole, sum(wait.seconds for wait in found))
            for name, value in zip(samples, (whole, whole - waiting, waiting), strict=True):
                samples[name].append(value)
            phases.append(dict(step.phases))
            for wait in found:
                calls, total = places.get(wait.place, (0, 0.0))
                places[wait.place] = calls + wait.calls, total + wait.seconds
        recompiled, left_out = compiled_graphs() - graphs, step.skipped - skipped
        outside = unlisted(step, waits)
    samples["images_per_second"] = [batch / value for value in samples["step_seconds"]]
    count = len(phases)
    return {
        **{key: value for name, values in samples.items() for key, value in spread(name, values).items()},
        "steps": count,
        "warmup_seconds": warmup,
        "host_bound": statistics.median(samples["waiting_seconds"])
        < HOST_BOUND * statistics.median(samples["step_seconds"]),
        "phases": {name: statistics.median(each.get(name, 0.0) for each in phases) for name in phases[0]},
        "waits": [
            {"place": place, "calls_per_step": calls / count, "seconds_per_step": total / count}
            for place, (calls, total) in sorted(places.items(), key=lambda item: -item[1][1])[:12]
        ],
        "unlisted_waits": outside,
        "graphs": graphs,
        "recompiled": recompiled,
        "skipped_steps": left_out,
        **memory(device),
    }


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median, and 10th and 90th percentile as NAME_p10 and NAME_p90."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {name: statistics.median(values), f"{name}_p10": tenths[0], f"{name}_p90": tenths[-1]}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> dict[str, int]:
    """Peak bytes of the measured steps, and what the allocator took from the device; the process's on a CPU."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "reserved_memory_bytes": reserved}
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def settings(args, step: Step) -> dict[str, Any]:
    """What decides how fast the same mathematics runs."""
    backends = torch.backends
    return {
        "compile": args.compile,
        "stage": getattr(step, "stage", None),
        "optimizer": type(step.trainer.engine.optimizer if args.way == "ours" else step.optimizer).__name__,
        "overflow_check": not args.no_overflow_check if args.way == "ours" else None,
        "precision": args.precision if args.way == "public" else "bf16",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": backends.cudnn.allow_tf32,
        "cudnn_benchmark": backends.cudnn.benchmark,
        "attention": [
            name
            for name in ("flash", "mem_efficient", "cudnn", "math")
            if getattr(backends.cuda, f"{name}_sdp_enabled")()
        ],
    }


def shares(row: dict[str, Any], config: Config, way: str, parameters: int) -> dict[str, Any]:
    """The step against what the device can do: model FLOPs utilization, and the limit of arithmetic and memory."""
    size, _ = backbone(config.model.name)
    grid = token_grid(config.data.image_size, config.latents.name, config.model.name)
    tokens = grid[0] * grid[1]
    flops = row["batch"] * training_flops(config.model.name, config.alignment["repa"].encoder, tokens)
    per_element = ELEMENTWISE[row["compile"]] if way == "ours" else PUBLIC_ELEMENTWISE
    traffic = sum(per_element) * size.depth * row["batch"] * tokens * size.width
    traffic += parameters * (OPTIMIZER_BYTES if way == "ours" else PUBLIC_OPTIMIZER_BYTES)
    gpu, rate = data_sheet(), flops / row["step_seconds"]
    limit = flops / row["product_flops_per_second"] + (traffic / gpu.bandwidth if gpu else 0.0)
    return {
        "parameters": parameters,
        "flops_per_step": flops,
        "memory_bytes_per_step": traffic,
        "limit_seconds": limit,
        "mfu": rate / gpu.fp16 if gpu else None,
        "mfu_of_product": rate / row["product_flops_per_second"],
    }


def shortage(error: BaseException) -> str | None:
    """One line if memory did not suffice; None: it is another error."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return f"memory does not suffice ({text or type(error).__name__}); use a smaller --batch"
    return None


def summary(row: dict[str, Any]) -> str:
    """The row on a few lines."""
    phases = "  ".join(f"{phase} {1e3 * value:.1f}" for phase, value in row["phases"].items())
    of_sheet = f", {row['mfu']:.1%} of the data sheet" if row["mfu"] is not None else ""
    lines = [
        f"{row['case']}: {row['images_per_second']:.1f} images/s "
        f"({row['images_per_second_p10']:.1f} to {row['images_per_second_p90']:.1f}), "
        f"step {1e3 * row['step_seconds']:.1f} ms, of it host {1e3 * row['host_seconds']:.1f}, "
        f"waiting for the device {1e3 * row['waiting_seconds']:.1f}; limit {1e3 * row['limit_seconds']:.1f} ms; "
        f"MFU {row['mfu_of_product']:.1%} of a matrix product{of_sheet}; {row['peak_memory_bytes'] / 1e9:.1f} GB",
        f"  phases (ms): {phases}",
        *(
            f"  waits {1e3 * wait['seconds_per_step']:.2f} ms in {wait['calls_per_step']:g} calls: {wait['place']}"
            for wait in row["waits"][:6]
        ),
    ]
    if row["unlisted_waits"]:
        lines.append(f"  waits that are counted as host time: {row['unlisted_waits']}")
    if row["recompiled"] or row["skipped_steps"]:
        lines.append(f"  not clean: {row['recompiled']} recompilations, {row['skipped_steps']} steps skipped")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
