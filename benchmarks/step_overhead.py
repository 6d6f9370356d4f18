"""What our step costs over a bare torch loop with the same mathematics: plain, and under ZeRO-3 on one process.

SiT-S/2 with REPA on precomputed input, batch 8; then the host's time alone, on a 28-block model so narrow (width 64)
that computing is nothing. The loops take turns, round by round, in one process; the median round counts.

    python -m benchmarks.step_overhead
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.command import Parser, answered, positive, put_row
from repa_scale import sizes
from repa_scale.clock import Clock
from repa_scale.config import Config
from repa_scale.deepspeed_config import deepspeed_dict
from repa_scale.draws import draw, drop_labels
from repa_scale.ema import ShardEma
from repa_scale.engine import Engine
from repa_scale.interpolant import Interpolant
from repa_scale.models.initial import initial_values, initialize
from repa_scale.objective import build_objective, total
from repa_scale.ranks import Ranks

PLAIN_GOAL, ZERO3_GOAL = 1.05, 1.25
BATCH, Z = 8, 768
TINY = "SiT-Tiny/8"  # of a rehearsal


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    args = parser.parse_args(argv)
    rounds, small = (1, TINY) if args.rehearse else (args.rounds, "SiT-S/2")
    ranks = Ranks.from_environment("cpu" if args.rehearse else args.device)
    ranks.start()
    device = ranks.device
    sizes.BACKBONES["SiT-Thin"] = sizes.SiTSize(28, 64, 1)  # for this process alone
    batch = Precomputed(device)
    row = {}
    for name, model, precision in ((small, small, "fp32"), ("host", "SiT-Thin/8", "bf16")):
        config = config_of(model, precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        loops: dict[str, Callable[[int], dict[str, float]]] = {
            "bare": bare_loop(config, batch, device, dtype),
            "plain": plain_loop(config, batch, device, dtype),
            "zero3": zero3_loop(config, batch, ranks),
        }
        seconds, phases = take_turns(loops, rounds, device)
        row[name] = {
            "seconds": seconds,
            "plain_over_bare": seconds["plain"] / seconds["bare"],
            "zero3_over_bare": seconds["zero3"] / seconds["bare"],
            "phases": phases,
        }
        print(f"\n{name} ({model}, {precision}, batch {BATCH}), median of {rounds} rounds")
        for loop, value in seconds.items():
            parts = "  ".join(f"{phase} {1e3 * part:.1f}" for phase, part in phases[loop].items())
            print(f"  {loop:6s} {1e3 * value:8.1f} ms  {value / seconds['bare']:.3f} x   ({parts} ms)")
    print(f"\ngoals on {small}: plain at most {PLAIN_GOAL}, ZeRO-3 at most {ZERO3_GOAL} times bare")
    row |= {"goals": {"plain": PLAIN_GOAL, "zero3": ZERO3_GOAL}, "threads": torch.get_num_threads()}
    put_row("step_overhead", row, args.rehearse)
    ranks.leave()
    return 0


def config_of(model: str, precision: str) -> Config:
    config = Config()
    config.model.name, config.train.precision = model, precision
    config.train.global_batch = BATCH
    config.alignment["repa"].depth = 4
    if model != "SiT-S/2":
        config.alignment["repa"].projector_dim = 64
    return config


class Precomputed:
    """Latents, labels and encoder tokens, ready on the device."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x0 = torch.randn(BATCH, 4, 32, 32, generator=generator).to(device)
        self.labels = torch.randint(0, 1000, (BATCH,), generator=generator).to(device)
        self._tokens = torch.randn(BATCH, 256, Z, generator=generator).to(device)
        self.index = torch.arange(BATCH, device=device)

    def targets(self, tokens: int) -> Tensor:
        return self._tokens[:, :tokens]


def take_turns(
    loops: dict[str, Callable[[int], dict[str, float]]], rounds: int, device: torch.device
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Medians of the seconds a step and of its phases, by loop. One round of warm-up; the order turns every round."""
    seconds, phases = defaultdict(list), defaultdict(lambda: defaultdict(list))
    names = list(loops)
    for round_number in range(rounds + 1):
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            synchronize(device)
            began = time.perf_counter()
            parts = loops[name](round_number + 1)
            synchronize(device)
            if round_number:
                seconds[name].append(time.perf_counter() - began)
                for phase, value in parts.items():
                    phases[name][phase].append(value)
    medians = {name: statistics.median(seconds[name]) for name in names}
    return medians, {n: {p: statistics.median(v) for p, v in phases[n].items()} for n in names}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """Seconds between marks, on the host."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.parts[phase] = now - self._last
        self._last = now


def bare_loop(config: Config, batch: Precomputed, device: torch.device, dtype: torch.dtype):
    """What one would write by hand: torch's own random numbers, losses, clipping, AdamW and EMA; fp32 masters."""
    objective = build_objective(config).to(device)
    initialize(objective, seed=0)
    masters = [p.detach().clone() for p in objective.parameters()]
    objective.to(dtype)
    parameters = list(objective.parameters())
    for master in masters:
        master.requires_grad_(True)
    optimizer = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")
    ema = [master.detach().clone() for master in masters]
    model, projector = objective.model, objective.projectors["repa"]
    tokens = model.grid**2

    def step(_number: int) -> dict[str, float]:
        watch = Stopwatch()
        t = torch.rand(BATCH, device=device)
        noise = torch.randn_like(batch.x0)
        labels = torch.where(torch.rand(BATCH, device=device) < 0.1, 1000, batch.labels)
        at = t.view(-1, 1, 1, 1)
        x_t, velocity = (1 - at) * batch.x0 + at * noise, noise - batch.x0
        watch.mark("draws")
        predicted, hidden = model(x_t, t, labels, [4])
        denoising = (predicted.float() - velocity).square().mean()
        cosine = F.cosine_similarity(projector(hidden[4]).float(), batch.targets(tokens).float(), dim=-1, eps=1e-12)
        loss = denoising - 0.5 * cosine.mean()
        watch.mark("forward")
        loss.backward()
        watch.mark("backward")
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        if dtype != torch.float32:
            torch._foreach_copy_([p.data for p in parameters], [m.detach() for m in masters])
        watch.mark("optimizer")
        torch._foreach_lerp_(ema, [m.detach() for m in masters], 1 - 0.9999)
        watch.mark("ema")
        return watch.parts

    if dtype == torch.float32:  # the weights are their own masters
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data = master.detach()
    return step


def our_losses(
    config: Config, batch: Precomputed, forward: Callable, number: int, watch: Stopwatch, tokens: int
) -> Tensor:
    """Draws, interpolant and losses as the trainer makes them."""
    noise = draw(config.seed, number, batch.index, (4, 32, 32))
    labels = drop_labels(batch.labels, noise.drop, config.model.num_classes)
    x_t, velocity = Interpolant("linear")(batch.x0, noise.noise, noise.t)
    watch.mark("draws")
    losses = forward(x_t, noise.t, labels, velocity, {"repa": batch.targets(tokens)})
    loss = total(losses, {"repa": 0.5})
    watch.mark("forward")
    return loss


def plain_loop(config: Config, batch: Precomputed, device: torch.device, dtype: torch.dtype):
    """Our draws, objective, clock and EMA around a plain torch optimiser."""
    objective = build_objective(config).to(device)
    initialize(objective, seed=0)
    objective.clock = Clock(device)
    masters = [p.detach().clone() for p in objective.parameters()]
    objective.to(dtype)
    parameters = list(objective.parameters())
    if dtype == torch.float32:
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data = master
    optimizer = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")
    ema = ShardEma(masters, 0.9999)
    tokens = objective.model.grid**2

    def step(number: int) -> dict[str, float]:
        watch = Stopwatch()
        loss = our_losses(config, batch, objective, number, watch, tokens)
        objective.backward_begins()
        loss.backward()
        watch.mark("backward")
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        if dtype != torch.float32:
            torch._foreach_copy_([p.data for p in parameters], masters)
        watch.mark("optimizer")
        ema.update()
        watch.mark("ema")
        objective.clock.read()
        return watch.parts

    return step


def zero3_loop(config: Config, batch: Precomputed, ranks: Ranks):
    """Our whole step under DeepSpeed ZeRO-3."""
    with torch.device("meta"):
        count = sum(p.numel() for p in build_objective(config).parameters())
    engine = Engine(
        lambda: build_objective(config),
        deepspeed_dict(config, 1, count, ranks.device.type),
        ranks,
        learning_rate=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    )
    engine.write(lambda name, shape, start, stop: initial_values(name, shape, start, stop, 0))
    engine.module.clock = Clock(ranks.device)
    ema = ShardEma([shard.master for shard in engine.shards], 0.9999)
    tokens = engine.module.model.grid**2

    def step(number: int) -> dict[str, float]:
        watch = Stopwatch()
        loss = our_losses(config, batch, engine, number, watch, tokens)
        engine.module.backward_begins()
        engine.backward(loss)
        watch.mark("backward")
        outcome = engine.step(1e-4)
        watch.mark("optimizer")
        if outcome.applied:
            ema.update()
        watch.mark("ema")
        engine.module.clock.read()
        return watch.parts

    return step


if __name__ == "__main__":
    sys.exit(answered(main))
