"""What it takes to make one file of weights out of the checkpoint of two ranks: `repa-scale export` and DeepSpeed's
zero_to_fp32.py, each on its own checkpoint of the same model with the same weights.

Each is run as the command that a user types, in turn; a thread reads the process's memory every 5 ms. Both write
float32 safetensors; ours also verifies what it reads and hashes what it writes. Peak memory is anonymous memory, which
only the process itself can give back, and beside it the resident peak (VmHWM), which counts mapped files too.
The least possible is a piece of a tensor, above what Python and torch hold.

    python -m benchmarks.export --model SiT-XL/2
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.durability import build
from benchmarks.rows import write_row
from repa_scale.ranks import Ranks

IDENTITY = {"keys": {}, "identity_hash": "0", "pair_id": "0"}
IMPORTS = {  # what each process holds before it has read anything
    "ours": "import repa_scale.export, repa_scale.export.safetensors",
    "DeepSpeed": "import deepspeed.utils.zero_to_fp32",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-XL/2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to write; by default the system's temporary folder")
    parser.add_argument("--part", choices=("save",), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        save(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="export-") as folder:
        row = compare(args, Path(folder))
    show(row)
    write_row("export", row)


def save(args: argparse.Namespace) -> None:
    """One of two ranks: the same state as our checkpoint and as DeepSpeed's."""
    from repa_scale.checkpoint import Piece, publish, step_folder, write_manifest, write_pieces
    from repa_scale.state import describe_state

    ranks = Ranks.from_environment("cpu")
    ranks.start()
    engine, ema, config = build(args, ranks)
    del ema  # the masters stand in for it: at SiT-XL's size every copy of the state counts
    engine.write(lambda name, shape, start, stop: torch.randn(stop - start).mul_(0.02))
    folder = Path(args.folder)
    temporary = folder / "ours" / f"{step_folder(1)}.tmp-1"
    temporary.mkdir(parents=True, exist_ok=True)
    pieces = [
        Piece(s.name, s.shape, s.start, s.stop, {"master": s.master, **s.moments, "ema": s.master})
        for s in engine.shards
    ]
    entries = ranks.gather_objects(write_pieces(temporary, ranks.rank, ranks.world_size, pieces))
    if ranks.is_main:
        write_manifest(temporary, entries, describe_state(engine, ranks, 1, config, IDENTITY, {}))
        publish(temporary, folder / "ours" / step_folder(1))
    engine.ds.save_checkpoint(str(folder / "deepspeed"), tag="x")
    ranks.barrier()
    ranks.leave()


def compare(args: argparse.Namespace, folder: Path) -> dict:
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    make = ["-m", "benchmarks.export", "--part", "save", "--model", args.model, "--folder", str(folder)]
    done = subprocess.run([*torchrun, *make], capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"the checkpoints could not be made:\n{done.stderr[-3000:]}")
    [checkpoint] = (folder / "ours").glob("step_*")
    script = folder / "deepspeed" / "zero_to_fp32.py"  # save_checkpoint puts it there for its users
    ways = {
        "ours": ["-m", "repa_scale", "export", checkpoint, "--weights", "raw", "--out", folder / "out ours"],
        "DeepSpeed": [script, folder / "deepspeed", folder / "out DeepSpeed", "--safe_serialization"],
    }
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, words in ways.items():
            shutil.rmtree(folder / f"out {name}", ignore_errors=True)
            os.sync()
            runs[name].append(watched(words))
    row: dict = {"model": args.model, "rounds": args.rounds, "weights_bytes": same_weights(folder)}
    for name, each in runs.items():
        idle = watched(["-c", IMPORTS[name]])
        row[name] = {
            "seconds": statistics.median(run["seconds"] for run in each),
            "best_seconds": min(run["seconds"] for run in each),
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in each),
            "import_cpu_seconds": idle["cpu_seconds"],
            "import_seconds": idle["seconds"],
            "peak_anonymous_bytes": max(run["anonymous"] for run in each),
            "peak_resident_bytes": max(run["resident"] for run in each),
            "import_anonymous_bytes": idle["anonymous"],
        }
    ours, theirs = row["ours"], row["DeepSpeed"]
    row["memory_ratio"] = ours["peak_anonymous_bytes"] / theirs["peak_anonymous_bytes"]
    row["memory_ratio_above_imports"] = _above(ours) / max(1, _above(theirs))
    row["time_ratio"] = ours["seconds"] / theirs["seconds"]
    row["cpu_ratio"] = ours["cpu_seconds"] / theirs["cpu_seconds"]
    return row


def watched(words: list) -> dict:
    """Runs Python with `words`; its seconds, those of a processor, and its peak memory in bytes."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], stdout=output, stderr=subprocess.STDOUT, env=environment()
        )
        most = {"anonymous": 0, "resident": 0}
        while process.poll() is None:
            for line in _status(process.pid):
                key, _, value = line.partition(":")
                if kind := {"RssAnon": "anonymous", "VmHWM": "resident"}.get(key):
                    most[kind] = max(most[kind], 1024 * int(value.split()[0]))
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{words} failed:\n{output.read()[-3000:].decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, **most}


def _status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return []


def same_weights(folder: Path) -> int:
    """Bytes of the exported weights, after each of ours was compared with DeepSpeed's."""
    total = 0
    theirs = {}
    for file in (folder / "out DeepSpeed").glob("*.safetensors"):
        opened = safe_open(file, framework="pt")
        theirs |= {name.removeprefix("model."): opened for name in opened.keys()}  # noqa: SIM118  (no mapping)
    with safe_open(folder / "out ours" / "model.safetensors", framework="pt") as ours:
        for name in ours.keys():  # noqa: SIM118
            tensor = ours.get_tensor(name)
            total += tensor.nbytes
            if name != "pos_embed":
                key = next(key for key in (name, f"model.{name}") if key in theirs[name].keys())  # noqa: SIM118
                assert torch.equal(tensor, theirs[name].get_tensor(key)), name
    return total


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _above(one: dict) -> int:
    return one["peak_anonymous_bytes"] - one["import_anonymous_bytes"]


def show(row: dict) -> None:
    print(f"\n{row['model']}, 2 ranks, {row['weights_bytes'] / 1e9:.2f} GB of weights, {row['rounds']} rounds")
    for name in ("ours", "DeepSpeed"):
        one = row[name]
        print(
            f"  {name:10s} {one['seconds']:7.2f} s, best {one['best_seconds']:.2f}, imports {one['import_seconds']:.2f}"
        )
        print(
            f"{'':12s} own memory at most {one['peak_anonymous_bytes'] / 1e6:.0f} MB, {_above(one) / 1e6:.0f} MB "
            f"above its imports; resident {one['peak_resident_bytes'] / 1e6:.0f} MB"
        )
    print(
        f"  ours / DeepSpeed: time {row['time_ratio']:.2f}, of a processor {row['cpu_ratio']:.2f}, memory "
        f"{row['memory_ratio']:.2f}, above the imports {row['memory_ratio_above_imports']:.3f}"
    )


if __name__ == "__main__":
    main()
