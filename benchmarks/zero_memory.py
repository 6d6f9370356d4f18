"""Bytes that stay on a rank after a step under ZeRO-3, a parameter, against the arithmetic; and two peaks.

Theory a parameter over all ranks: weights 2 (bf16) or 4 (fp32), gradients 4 or 2, fp32 master 4, Adam's moments 8,
EMA 4. DeepSpeed's buckets do not shrink with the ranks and are listed apart, as are the peaks while
the weights are made (a rank that held the whole model would show it there) and of a step.

    python -m benchmarks.zero_memory            1, 2 and 4 processes, three settings
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.command import Parser, positive, put_row

GOAL = 0.05  # relative
SETTINGS = {  # name -> precision, dtype in which gradients are kept, theory without the EMA
    "bf16 weights, fp32 gradients": ("bf16", "fp32", 18),
    "bf16 weights, bf16 gradients": ("bf16", "bf16", 16),
    "fp32": ("fp32", "fp32", 20),
}
EMA_BYTES = 4


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="SiT-B/8", help="default: SiT-B/8, 136 M parameters and few tokens")
    parser.add_argument("--processes", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(args.model, *args.worker.split(","))
        return
    settings, counts, model = SETTINGS, args.processes, args.model
    if args.rehearse:
        settings, counts, model = {"fp32": SETTINGS["fp32"]}, [1], "SiT-Tiny/8"
    rows = []
    for name, (precision, gradients, theory) in settings.items():
        for processes in counts:
            ranks = start(model, precision, gradients, processes)
            want = (theory + EMA_BYTES) / processes
            got = max(rank["state_bytes"] for rank in ranks) / ranks[0]["parameters"]
            built = max(rank["build_peak_bytes"] for rank in ranks) / ranks[0]["model_bytes"]
            case = {"setting": name, "processes": processes, "theory": want, "measured": got, "built": built}
            rows.append({**case, "ranks": ranks})
            first = ranks[0]
            print(
                f"{name:30s} {processes} processes: {got:6.3f} bytes a parameter, theory {want:6.3f} "
                f"({got / want - 1:+.1%}); apart: buckets {first['bucket_bytes'] / 1e6:.0f} MB, "
                f"other {first['other_bytes'] / 1e6:.0f} MB, "
                f"step's peak {first['step_peak_bytes'] / 1e6:.0f} MB; weights made in {built:.2f} of the model's bytes"
            )
    worst = max(abs(row["measured"] / row["theory"] - 1) for row in rows)
    print(f"largest distance from theory {worst:.1%} (goal {GOAL:.0%})")
    put_row("zero_memory", {"model": model, "worst": worst, "goal": GOAL, "rows": rows}, args.rehearse)


def start(model: str, precision: str, gradients: str, processes: int) -> list[dict]:
    """Runs the workers and returns each rank's figures."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for rank in range(processes):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-m", "benchmarks.zero_memory", "--model", model]
            command += ["--worker", f"{precision},{gradients},{folder}"]
            workers.append(
                subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
            )
        for process in workers:
            _, errors = process.communicate(timeout=900)
            if process.returncode:
                raise SystemExit(f"a worker failed:\n{errors.decode()[-3000:]}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def worker(model: str, precision: str, gradients: str, folder: str) -> None:
    """One rank: builds, steps twice, counts."""
    from repa_scale.config import Config
    from repa_scale.deepspeed_config import deepspeed_dict
    from repa_scale.ema import ShardEma
    from repa_scale.engine import Engine
    from repa_scale.objective import build_objective, total
    from repa_scale.ranks import Ranks

    ranks = Ranks.from_environment()
    ranks.start()
    give_freed_memory_back()
    config = Config()
    config.model.name, config.train.precision, config.train.global_batch = model, precision, ranks.world_size
    config.alignment["repa"].depth = 4
    with torch.device("meta"):
        count = sum(p.numel() for p in build_objective(config).parameters())
    settings = deepspeed_dict(config, ranks.world_size, count, ranks.device.type)
    settings["data_types"]["grad_accum_dtype"] = gradients
    small, built = copy.deepcopy(config), 0
    small.model.name, small.alignment["repa"].depth = "SiT-Nano/8", 1

    def build():
        nonlocal built
        build_objective(small)  # so that libraries loaded on the way are not counted
        before = watermark(ranks.device)
        objective = build_objective(config)
        built = peak(ranks.device) - before
        return objective

    adam = {"learning_rate": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    engine = Engine(build, settings, ranks, **adam)
    engine.write(lambda name, shape, start, stop: torch.full((stop - start,), 0.01))
    ema = ShardEma([shard.master for shard in engine.shards], 0.9999)
    watermark(ranks.device)
    for _ in range(2):
        x = torch.randn(1, 4, 32, 32, device=ranks.device)
        tokens = engine.module.model.grid**2
        target = {"repa": torch.randn(1, tokens, 768, device=ranks.device)}
        losses = engine(
            x, torch.rand(1, device=ranks.device), torch.zeros(1, dtype=torch.int64, device=ranks.device), x, target
        )
        engine.backward(total(losses, {"repa": 0.5}))
        engine.step(1e-4)
        ema.update()
    step_peak = peak(ranks.device)
    del x, target, losses
    state, buckets, other = classified(engine, ema)
    Path(folder, f"{ranks.rank}.json").write_text(
        json.dumps(
            {
                "parameters": count,
                "state_bytes": state,
                "bucket_bytes": buckets,
                "other_bytes": other,
                "build_peak_bytes": built,
                "step_peak_bytes": step_peak,
                "model_bytes": count * (2 if precision == "bf16" else 4),
            }
        )
    )
    ranks.barrier()
    ranks.leave()


def classified(engine, ema) -> tuple[int, int, int]:
    """Bytes of live tensors: the model's state, DeepSpeed's buckets, and the rest (position table, counters)."""
    optimizer = engine.optimizer
    state = [p.ds_tensor for p in engine.names.values()] + list(ema.values)
    state += [t for shard in engine.shards for t in (shard.master, *shard.moments.values())]
    state += gradients_of(optimizer)
    sizes = {}
    gc.collect()
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.device.type != "meta":
            storage = item.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    owned = {tensor.untyped_storage().data_ptr() for tensor in state}
    state_bytes = sum(size for pointer, size in sizes.items() if pointer in owned)
    bucket_tensors = [
        bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values() if bucket.buffer is not None
    ]
    pointers = {t.untyped_storage().data_ptr() for t in bucket_tensors} - owned
    buckets = sum(sizes.get(pointer, 0) for pointer in pointers)
    return state_bytes, buckets, sum(sizes.values()) - state_bytes - buckets


def gradients_of(optimizer) -> list[torch.Tensor]:
    """The buffers in which this rank's gradients stay between steps."""
    buffer = getattr(optimizer, "grad_partitions_flat_buffer", None)
    return [buffer] if buffer is not None else []


def give_freed_memory_back() -> None:
    """Makes glibc map each tensor by itself, so that the resident memory of a process is what it really uses."""
    mmap_threshold = -3  # glibc's M_MMAP_THRESHOLD of mallopt
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(mmap_threshold, 2**16)


def watermark(device: torch.device) -> int:
    """Begins a new high-water mark of memory, and returns the bytes in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes in use since `watermark`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
