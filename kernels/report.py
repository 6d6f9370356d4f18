"""`python -m repa_scale.kernels.report`: what the compiler makes of every kernel variant, without a GPU.

--complete            every pair of dtypes for every tile (default: mixed dtypes at 768 channels alone)
--architectures 90    some of 80, 90, 100
--json                one JSON object a variant
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from os import cpu_count

from repa_scale.kernels.ahead_of_time import Built, build, variants
from repa_scale.kernels.choice import INSTALLED, INTERPRETED
from repa_scale.kernels.table import ARCHITECTURES

HEADINGS = (
    "kernel",
    "dtypes",
    "z",
    "tile",
    "warps",
    "arch",
    "registers",
    "shared",
    "spilled",
    "occupancy",
    "bytes/row",
)
FORMAT = "{:15s} {:10s} {:>5} {:>8s} {:>5} {:>6s} {:>9} {:>7} {:>7} {:>9} {:>10}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repa_scale.kernels.report", description=__doc__.splitlines()[0])
    parser.add_argument("--complete", action="store_true", help="every pair of dtypes for every tile")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--json", action="store_true", help="one JSON object a variant")
    args = parser.parse_args(argv)
    if problem := "triton is not installed" if not INSTALLED else INTERPRETED and "TRITON_INTERPRET=1 is set; unset it":
        print(f"report: nothing can be compiled: {problem}", file=sys.stderr)
        return 64
    wanted = variants(args.complete, tuple(args.architectures))
    if not args.json:
        print(FORMAT.format(*HEADINGS))
    spilled = 0
    with ProcessPoolExecutor(cpu_count(), mp_context=get_context("spawn")) as pool:
        for built in pool.map(build, wanted, chunksize=4):
            spilled += bool(built.spilled)
            print(json.dumps(as_dict(built)) if args.json else FORMAT.format(*as_dict(built).values()), flush=True)
    if not args.json:
        print(f"{len(wanted)} variants, {spilled} with spills")
    return 1 if spilled else 0


def as_dict(built: Built) -> dict:
    """One row: strings and numbers."""
    variant = built.variant
    return {
        "kernel": variant.kernel,
        "dtypes": "-".join(variant.dtypes) or "fp32",
        "z": variant.width,
        "tile": f"{variant.tile.rows}x{variant.tile.columns}",
        "warps": variant.tile.warps,
        "architecture": f"sm_{variant.architecture}",
        "registers": built.registers,
        "shared": built.shared,
        "spilled": built.spilled,
        "occupancy": f"{built.occupancy:.0%}",
        "bytes_a_row": f"{built.bytes_a_row:.1f}",
    }


if __name__ == "__main__":
    sys.exit(main())
