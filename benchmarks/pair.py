"""A row from a comparison that `repa-scale compare` wrote, and from the label agreement of the samples if there is one.

python -m benchmarks.pair demo/report --case digits --samples demo/samples
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.rows import write_row

RUNS = ("repa", "baseline")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="a folder made by repa-scale compare")
    parser.add_argument("--case", required=True, help="what the runs were trained on")
    parser.add_argument("--samples", type=Path, help="folder of repa/ and baseline/ with evaluation.json")
    args = parser.parse_args()
    result = json.loads((args.report / "compare.json").read_text())
    tags, losses = result["runs"]["repa"]["tags"], result["losses"]
    row = {
        "case": args.case,
        "model": tags["model"],
        "encoder": tags["encoder"],
        "world_size": int(tags["world_size"]),
        "step": losses["step"],
        "rows": losses["rows"],
        "warnings": result["warnings"],
    }
    for run in RUNS:
        row[run] = {"denoising_loss": losses[f"{run}_mean"], **result["summary"][run]}
        if args.samples:
            evaluated = json.loads((args.samples / run / "evaluation.json").read_text())
            row[run]["label_agreement"] = evaluated["label_agreement"]
    print(json.dumps(row, indent=1))
    write_row("pair", row)


if __name__ == "__main__":
    main()
