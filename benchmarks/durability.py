"""What durability costs: saving, checksums, resuming, and what watchdog and judge add to a step.

Two processes over gloo save the same state in turn with our saver (waiting, and behind the training), DeepSpeed's
`save_checkpoint` and torch's distributed checkpoint (waiting and asynchronous); then one process takes the state up.
DeepSpeed's checkpoint holds no EMA, so it writes three quarters of the bytes; nothing of it has a checksum. All but
DeepSpeed's are made durable by fsync.

    python -m benchmarks.durability --model SiT-S/2
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.rows import write_row
from repa_scale.checksums import ALGORITHMS, checksum_file
from repa_scale.config import CheckpointConfig, Config, HealthConfig
from repa_scale.deepspeed_config import deepspeed_dict
from repa_scale.divergence import Judge
from repa_scale.ema import ShardEma
from repa_scale.engine import Engine
from repa_scale.goodput import Goodput
from repa_scale.health import reduce_step
from repa_scale.models.initial import initial_values
from repa_scale.objective import build_objective
from repa_scale.ranks import Ranks
from repa_scale.saving import Saver
from repa_scale.state import describe_state, load_state, newest_verified
from repa_scale.stragglers import LOCAL_PHASES, Stragglers
from repa_scale.watchdog import Watchdog

IDENTITY = {"keys": {}, "identity_hash": "0", "pair_id": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to write; by default the system's temporary folder")
    parser.add_argument("--part", choices=("save", "load"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        result = {"save": save, "load": load}[args.part](args)
        if result is not None:  # rank 0
            print("RESULT " + json.dumps(result), flush=True)
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="durability-") as folder:
        args.folder = folder
        row = {"model": args.model, "rounds": args.rounds, "checksums": checksums(Path(folder))}
        row |= start(args, "save", 2)
        row |= start(args, "load", 1)
        row["universal_seconds"] = universal(Path(folder))
    row["step"] = step_costs()
    with tempfile.TemporaryDirectory(prefix="restart-") as folder:
        row["restart"] = restart(Path(folder), args.rounds)
    show(row)
    write_row("durability", row)


def start(args: argparse.Namespace, part: str, processes: int) -> dict:
    """Runs one part of this program on so many processes; what rank 0 found."""
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--standalone", "--nproc-per-node", processes, "-m", "benchmarks.durability", "--part", part]
    command += ["--model", args.model, "--rounds", args.rounds, "--folder", args.folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"part {part} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def build(args: argparse.Namespace, ranks: Ranks) -> tuple[Engine, ShardEma, Config]:
    config = Config()
    config.method, config.model.name, config.train.precision = "baseline", args.model, "fp32"
    config.train.global_batch = 2
    with torch.device("meta"):
        count = sum(p.numel() for p in build_objective(config).parameters())
    ds_config = deepspeed_dict(config, ranks.world_size, count, "cpu")
    engine = Engine(
        lambda: build_objective(config),
        ds_config,
        ranks,
        learning_rate=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    )
    engine.write(lambda name, shape, start, stop: initial_values(name, shape, start, stop, 0))
    return engine, ShardEma([shard.master for shard in engine.shards], 0.999), config


def save(args: argparse.Namespace) -> dict | None:
    import torch.distributed.checkpoint as dcp

    ranks = Ranks.from_environment("cpu")
    ranks.start()
    engine, ema, config = build(args, ranks)
    folder = Path(args.folder)
    saver = Saver(engine, ema, ranks, folder / "ours", CheckpointConfig(keep_last=1))
    tensors = {
        f"{ranks.rank}/{kind}/{shard.name}": value
        for shard, average in zip(engine.shards, ema.values, strict=True)
        for kind, value in {"master": shard.master, **shard.moments, "ema": average}.items()
    }
    number = 0

    def ours(wait: bool) -> tuple[float, float]:
        nonlocal number
        number += 1
        began = time.perf_counter()
        facts = describe_state(engine, ranks, number, config, IDENTITY, {})
        saver.save(number, 1, facts, wait)
        stopped = time.perf_counter() - began
        saver.settle()
        return stopped, time.perf_counter() - began

    def deepspeed() -> tuple[float, float]:
        shutil.rmtree(folder / "deepspeed", ignore_errors=True)
        ranks.barrier()
        began = time.perf_counter()
        engine.ds.save_checkpoint(str(folder / "deepspeed"), tag="x")
        return (time.perf_counter() - began,) * 2

    def distributed(wait: bool) -> tuple[float, float]:
        if ranks.is_main:
            shutil.rmtree(folder / "dcp", ignore_errors=True)
        ranks.barrier()
        began = time.perf_counter()
        if wait:
            dcp.save(tensors, checkpoint_id=folder / "dcp")
            return (time.perf_counter() - began,) * 2
        future = dcp.async_save(tensors, checkpoint_id=folder / "dcp")
        stopped = time.perf_counter() - began
        future.result()
        ranks.barrier()
        return stopped, time.perf_counter() - began

    ways = {
        "ours, waiting": lambda: ours(True),
        "ours, behind": lambda: ours(False),
        "DeepSpeed save_checkpoint": deepspeed,
        "torch distributed checkpoint": lambda: distributed(True),
        "torch distributed checkpoint, async": lambda: distributed(False),
    }
    stops, totals = defaultdict(list), defaultdict(list)
    for round_number in range(args.rounds + 1):
        for name, way in ways.items():
            os.sync()
            ranks.barrier()
            stopped, whole = way()
            if round_number:  # the first makes buffers
                stops[name].append(max(ranks.gather_objects(stopped)))
                totals[name].append(max(ranks.gather_objects(whole)))
    copies = [_seconds(saver._copy) for _ in range(args.rounds)]
    sizes = ranks.gather_objects(sum(4 * value.numel() for value in tensors.values()))
    ranks.barrier()
    ranks.leave()
    if not ranks.is_main:
        return None
    return {
        "bytes": sum(sizes),
        "copy_seconds": statistics.median(copies),
        "save": {
            name: {
                "stop_seconds": statistics.median(stops[name]),
                "total_seconds": statistics.median(totals[name]),
                "best_total_seconds": min(totals[name]),
            }
            for name in ways
        },
    }


def load(args: argparse.Namespace) -> dict:
    """The state of two ranks on one."""
    import torch.distributed.checkpoint as dcp

    ranks = Ranks.from_environment("cpu")
    ranks.start()
    engine, ema, _ = build(args, ranks)
    with PeakMemory() as memory:
        began = time.perf_counter()
        reader = newest_verified(Path(args.folder) / "ours", ranks)
        verified = time.perf_counter() - began
        load_state(engine, ema, reader)
        ours = time.perf_counter() - began
    largest = max(4 * shard.master.numel() for shard in engine.shards)
    state = {}
    for rank in range(2):  # the flat tensors as two ranks wrote them: no resharding is asked of it
        file = Path(args.folder) / "ours" / reader.folder.name / f"rank_{rank:05d}_of_00002.safetensors"
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                state[f"{rank}/{name}"] = torch.empty(opened.get_slice(name).get_shape())
    theirs = _seconds(lambda: dcp.load(state, checkpoint_id=Path(args.folder) / "dcp"))
    ranks.leave()
    return {
        "load": {
            "ours_seconds": ours,
            "of_it_verifying_seconds": verified,
            "torch_distributed_checkpoint_seconds": theirs,
            "ours_more_peak_bytes": memory.bytes,
            "largest_parameter_bytes": largest,
        }
    }


def universal(folder: Path) -> float | None:
    """DeepSpeed's conversion, which stands between its checkpoint of two ranks and a start on one."""
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        folder / "deepspeed" / "x",
    ]
    command += ["--output_folder", folder / "universal", "--num_extract_workers", 1, "--num_merge_workers", 1]
    began = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        print(f"ds_to_universal failed: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return time.perf_counter() - began


def checksums(folder: Path) -> dict:
    """GB/s of each algorithm from the page cache, and of writing with fsync to the same disk, in turn."""
    size = 256 << 20
    data = os.urandom(1 << 20) * (size >> 20)
    speeds = defaultdict(list)
    for _ in range(3):
        path = folder / "blob"
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        speeds["disk write"].append(size / 1e9 / (time.perf_counter() - began))
        for algorithm in ALGORITHMS:
            speeds[algorithm].append(size / 1e9 / _seconds(lambda p=path, a=algorithm: checksum_file(p, a)))
    path.unlink()
    return {name: max(values) for name, values in speeds.items()}


def step_costs() -> dict:
    """Microseconds a step of what the loop does for durability, one process: all of it together, in a tight loop."""
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    ranks.start()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        watchdog = Watchdog(ranks, run, None, HealthConfig(), lambda: 0.0)
        judge, goodput = Judge(HealthConfig(), "fp32"), Goodput(run, "")
        stragglers = Stragglers(["host"])
        loss = torch.tensor(1.0)

        def step(number: int) -> None:
            for phase in ("data", "forward", "backward", "optimizer", "record"):
                watchdog.enter(phase, number)
            shared = reduce_step(ranks, [loss, loss], 7, [False, False], [0.0] * len(LOCAL_PHASES))
            judge.judge(number, number, shared.means[0] + 1e-3 * (number % 7), 1.0, True)
            stragglers.add(shared.seconds)
            goodput.step(number, 1.0, 0.0)

        for number in range(200):
            step(number)
        count = 2000
        seconds = _seconds(lambda: [step(number) for number in range(count)])
        watchdog.close()
    ranks.leave()
    return {"microseconds": 1e6 * seconds / count, "one_percent_of_a_step_of_seconds": 100 * seconds / count}


def restart(folder: Path, rounds: int) -> dict:
    """Seconds from SIGKILL to all ranks of a run to its first new step, started again at once; and what two processes
    take to import torch and DeepSpeed alone, which no start can do without."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from launching import SMALL, Launch

    data = folder / "digits"
    prepare = [sys.executable, "-m", "repa_scale", "prepare", "digits", "--out", data, "--size", "8"]
    subprocess.run([str(word) for word in prepare], check=True, capture_output=True)
    words = [*SMALL, "method=baseline", f"data.path={data}", "train.steps=100000", "train.checkpoint_every=1"]
    run, seconds = folder / "run", []
    launch = Launch(words, run)
    launch.wait_for_step(3)
    for _ in range(rounds):
        began = time.perf_counter()
        launch.kill()
        before = _attempt_of_last_row(run)
        launch = Launch(words, run)
        while _attempt_of_last_row(run) == before and launch.process.poll() is None:
            time.sleep(0.01)
        seconds.append(time.perf_counter() - began)
    launch.kill()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    imports = []
    for _ in range(rounds):
        began = time.perf_counter()
        bare = [subprocess.Popen([sys.executable, "-c", "import torch, deepspeed"], env=environment) for _ in range(2)]
        for process in bare:
            process.wait()
        imports.append(time.perf_counter() - began)
    return {"kill_to_new_step_seconds": statistics.median(seconds), "imports_seconds": statistics.median(imports)}


def _attempt_of_last_row(run: Path) -> int:
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["attempt"]
    except (OSError, ValueError, IndexError):
        return 0


def show(row: dict) -> None:
    print(f"\n{row['model']}, 2 processes, {row['bytes'] / 1e9:.2f} GB; medians of {row['rounds']} rounds")
    print(f"  copy to host memory {row['copy_seconds']:.3f} s")
    for name, each in row["save"].items():
        print(f"  {name:38s} stops training {each['stop_seconds']:7.3f} s, all {each['total_seconds']:7.3f} s")
    for name, value in row["load"].items():
        print(f"  load: {name:38s} {value / 1e6:.1f} MB" if "bytes" in name else f"  load: {name:38s} {value:.3f} s")
    if row["universal_seconds"] is not None:
        print(f"  load: ds_to_universal before DeepSpeed's own  {row['universal_seconds']:.3f} s")
    for name, value in row["checksums"].items():
        print(f"  {name:12s} {value:6.2f} GB/s")
    again = row["restart"]
    print(
        f"  kill to first new step: {again['kill_to_new_step_seconds']:.2f} s, of which two processes take "
        f"{again['imports_seconds']:.2f} s to import torch and DeepSpeed alone"
    )
    print(f"  a step's watchdog, judge, flags and goodput: {row['step']['microseconds']:.0f} us")


def _seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class PeakMemory:
    """How many bytes the process's own (anonymous) memory grew at most, looked at every 2 ms: not the pages of mapped
    files, which the system takes back whenever it likes. Use as a context; then `bytes`."""

    def __enter__(self) -> PeakMemory:
        self.bytes, self._before, self._over = 0, _anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, _anonymous_bytes() - self._before)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = max(self.bytes, _anonymous_bytes() - self._before)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
