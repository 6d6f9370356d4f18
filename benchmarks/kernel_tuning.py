"""Measures the alternatives to each row of the kernels' table on this GPU, and prints the table that it would choose.

    python -m benchmarks.kernel_tuning [--only spatial]

What it prints is put into kernels/table.py by hand, for the architecture that it ran on. The cosine's rows stay equal
between architectures (the order of its sums is promised), so there a gain has to show on all of them.
"""

from __future__ import annotations

import itertools
import sys
from unittest import mock

import torch
from repa_scale.kernels import table, unavailable

from benchmarks.command import Parser, positive, put_row
from benchmarks.kernel_subjects import subject
from benchmarks.kernel_timing import copy_bandwidth, timed
from benchmarks.rows import device_name

ROWS = 65536
# kernel -> (what the benchmark calls it, its sizes with a width that has them)
SUBJECTS = {
    "cosine": ("cosine", {512: 384, 1024: 768, 2048: 1536}),
    "layernorm": ("layernorm", {512: 384, 1024: 768, 2048: 1536}),
    "spatial": ("spatial", {256: 768}),
    "silu": ("projector", {64: 768}),
}
KEPT = 0.03  # a row of the table is not changed for less


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--only", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--rounds", type=positive, default=10)
    args = parser.parse_args(argv)
    # A rehearsal measures two tiles of one kernel in Triton's interpreter.
    device = torch.device("cpu" if args.rehearse else "cuda")
    only, count, most = (["spatial"], 256, 2) if args.rehearse else (args.only, ROWS, None)
    problem = unavailable(device) if args.rehearse or torch.cuda.is_available() else "there is no GPU"
    if problem:
        print(f"kernel_tuning: {problem}; the tiles of a GPU can only be measured on it", file=sys.stderr)
        return 64
    copy = copy_bandwidth(device, args.rounds)
    rows = []
    for kernel in only:
        name, sizes = SUBJECTS[kernel]
        for size, width in sizes.items():
            what = subject(name, count, width, device)
            inputs = [what.build() for _ in range(4)]
            now = table.tile(kernel, size, table.architecture_of(device))
            seconds = {}
            for tile in candidates(kernel, size, now)[:most]:
                by_size = {a: {**table.TILES[kernel][a], size: tile} for a in table.ARCHITECTURES}
                with mock.patch.dict(table.TILES, {kernel: by_size}):
                    table.rowwise.cache_clear()
                    found = timed(what.works["ours"], inputs, device, args.rounds, backward=True)
                seconds[tile] = found.seconds
                share = what.bytes / seconds[tile] / copy
                print(f"{kernel} {size}: {tile}: {1e6 * seconds[tile]:.1f} us, {share:.2f} of a copy")
            table.rowwise.cache_clear()
            best = min(seconds, key=seconds.__getitem__)
            chosen = best if seconds[best] < (1 - KEPT) * seconds[now] else now
            print(f"{kernel} {size}: {now} {1e6 * seconds[now]:.1f} us; chosen {chosen} {1e6 * seconds[chosen]:.1f} us")
            measured = {f"{t.rows}x{t.columns}, {t.warps} warps": value for t, value in seconds.items()}
            rows.append({"kernel": kernel, "size": size, "seconds": measured, "chosen": str(chosen)})
    put_row("kernel_tuning", {"device_rows": count, "copy_bytes_per_second": copy, "rows": rows}, args.rehearse)
    print(f"measured on {device_name()}")
    return 0


def candidates(kernel: str, size: int, now: table.Tile) -> list[table.Tile]:
    """Tiles with 8 to 64 elements a thread, the present one among them."""
    if kernel == "spatial":
        shapes = [(size, columns) for columns in (16, 32, 64)]
    elif kernel == "silu":
        shapes = list(itertools.product((32, 64, 128), (32, 64, 128)))
    else:
        shapes = [(rows, size) for rows in (1, 2, 4, 8)]
    tiles = [table.Tile(*shape, warps) for shape, warps in itertools.product(shapes, (2, 4, 8, 16))]
    return list(dict.fromkeys([now, *(t for t in tiles if 8 <= t.rows * t.columns / (32 * t.warps) <= 64)]))


if __name__ == "__main__":
    sys.exit(main())
