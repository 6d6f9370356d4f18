"""What the counter-based random numbers of a step cost, against a step of SiT-S/2 with REPA. Goal: under 1 %.

python -m benchmarks.rng
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from benchmarks.command import Parser, answered, positive, put_row
from benchmarks.step_overhead import BATCH, TINY, Precomputed, bare_loop, config_of, synchronize
from repa_scale.draws import draw
from repa_scale.ranks import Ranks

GOAL = 0.01


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    args = parser.parse_args(argv)
    rounds, model = (1, TINY) if args.rehearse else (args.rounds, "SiT-S/2")
    ranks = Ranks.from_environment("cpu" if args.rehearse else args.device)
    ranks.start()
    device = ranks.device
    batch = Precomputed(device)
    step = bare_loop(config_of(model, "fp32"), batch, device, torch.float32)
    seconds = {"draws": [], "torch draws": [], "step": []}
    for number in range(rounds + 1):
        for name, work in (
            ("draws", lambda n: draw(0, n, batch.index, (4, 32, 32))),
            (
                "torch draws",
                lambda n: (torch.rand(BATCH, 2, device=device), torch.randn(2, BATCH, 4, 32, 32, device=device)),
            ),
            ("step", step),
        ):
            synchronize(device)
            began = time.perf_counter()
            work(number)
            synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    share = medians["draws"] / medians["step"]
    print(
        f"draws {1e3 * medians['draws']:.2f} ms (torch's own generator {1e3 * medians['torch draws']:.2f} ms), "
        f"step {1e3 * medians['step']:.0f} ms: {share:.2%} (goal {GOAL:.0%})"
    )
    put_row("rng", {"seconds": medians, "share": share, "goal": GOAL, "batch": BATCH, "model": model}, args.rehearse)
    ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
