"""Images per second of SiT-XL/2 with DINOv2-B on one GPU, 256 px, ours against the public REPA loop, in one process.

Latents and images are random and lie on the device, so that nothing but the step is measured. The public code is not
part of this repository: name a checkout of it.

    python -m benchmarks.train_throughput --public path/to/REPA --batch 32
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.rows import write_row
from repa_scale.clock import Clock
from repa_scale.config import Config
from repa_scale.deepspeed_config import deepspeed_dict
from repa_scale.draws import draw, drop_labels
from repa_scale.ema import ShardEma
from repa_scale.encoders import build_encoder, preprocess
from repa_scale.engine import Engine
from repa_scale.errors import UserError
from repa_scale.flops import GPU_PEAK, training_flops
from repa_scale.interpolant import Interpolant
from repa_scale.models.initial import initial_values
from repa_scale.objective import build_objective, total
from repa_scale.ranks import Ranks
from repa_scale.sizes import encoder_spec

TOKENS = 256  # 256 px, factor 8, patch 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="SiT-XL/2")
    parser.add_argument("--encoder", default="dinov2-vit-b")
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--public", help="a checkout of the public REPA code")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    args = parser.parse_args()
    ranks = Ranks.from_environment(args.device)
    ranks.start()
    for batch in args.batch:
        data = Data(batch, ranks.device)
        ways: dict[str, Callable] = {"ours": ours(args.model, args.encoder, data, ranks, args.compile)}
        if args.public:
            ways["public"] = public(args.public, args.model, args.encoder, data, ranks.device)
        for name, step in ways.items():
            row = measure(step, args.steps, batch, ranks.device)
            mfu = row["images_per_second"] * training_flops(args.model, args.encoder, TOKENS) / peak_flops()
            row |= {"way": name, "model": args.model, "batch": batch, "mfu": mfu, "compile": args.compile}
            row["case"] = f"{name}, batch {batch}{', compiled' if args.compile else ''}"
            phases = "  ".join(f"{phase} {1e3 * value:.1f}" for phase, value in row["phases"].items())
            print(
                f"{name:7s} batch {batch}: {row['images_per_second']:.1f} images/s, "
                f"step {1e3 * row['step_seconds']:.1f} ms (host {1e3 * row['host_seconds']:.1f}; {phases}), "
                f"MFU {mfu:.1%}, {row['peak_memory_bytes'] / 1e9:.1f} GB"
            )
            write_row("train_throughput", row)
        del ways
    ranks.leave()


class Data:
    """Random images, latents and labels on the device."""

    def __init__(self, batch: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, generator=generator).to(device)
        self.x0 = torch.randn(batch, 4, 32, 32, generator=generator).to(device)
        self.labels = torch.randint(0, 1000, (batch,), generator=generator).to(device)
        self.index = torch.arange(batch, device=device)


def ours(model: str, encoder_name: str, data: Data, ranks: Ranks, compile: bool) -> Callable:
    config = Config()
    config.model.name, config.alignment["repa"].encoder = model, encoder_name
    config.alignment["repa"].depth = 4 if "-B" in model or "-S" in model else 8
    config.train.global_batch = len(data.labels)
    dtype = torch.bfloat16
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
        compile=compile,
    )
    engine.write(lambda name, shape, start, stop: initial_values(name, shape, start, stop, 0, ranks.device))
    engine.module.clock = clock = Clock(ranks.device)
    ema = ShardEma([shard.master for shard in engine.shards], 0.9999)
    encoder = build_encoder(encoder_name, "random", (16, 16), ranks.device, dtype)

    def step(number: int):
        with clock.phase("encoder"):
            targets = {"repa": encoder(data.images)}
        with clock.phase("draws"):
            noise = draw(0, number, data.index, (4, 32, 32))
            labels = drop_labels(data.labels, noise.drop, 1000)
            x_t, velocity = Interpolant("linear")(data.x0, noise.noise, noise.t)
        with clock.phase("forward"):
            loss = total(engine(x_t, noise.t, labels, velocity, targets), {"repa": 0.5})
        engine.module.backward_begins()
        with clock.phase("backward"):
            engine.backward(loss)
        with clock.phase("optimizer"):
            if engine.step(1e-4).applied:
                ema.update()
        return clock.read

    return step


def public(folder: str, model: str, encoder_name: str, data: Data, device: torch.device) -> Callable:
    """The step of the public train.py: its model and loss, bf16 autocast, fp32 weights, clipping, AdamW, full EMA."""
    sys.path.insert(0, folder)
    try:
        from loss import SILoss
        from models.sit import SiT_models
    except ImportError as error:
        raise UserError(f"--public {folder} is not a checkout of the public REPA code ({error})") from None
    spec = encoder_spec(encoder_name)
    net = SiT_models[model](
        input_size=32,
        num_classes=1000,
        use_cfg=True,
        z_dims=[spec.width],
        encoder_depth=8,
        fused_attn=True,
        qk_norm=False,
    ).to(device)
    average = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0)
    loss_of = SILoss(
        prediction="v", path_type="linear", encoders=[], accelerator=None, latents_scale=None, latents_bias=None
    )
    encoder = build_encoder(encoder_name, "random", (16, 16), device, torch.float32, "torch").network
    clock = Clock(device)

    def step(_number: int):
        autocast = torch.autocast(device.type, torch.bfloat16)
        with clock.phase("encoder"), torch.no_grad(), autocast:
            tokens = encoder.forward_features(preprocess(data.images, spec, 224))[:, spec.prefix_tokens :]
        with clock.phase("forward"), autocast:
            denoising, alignment = loss_of(net, data.x0, {"y": data.labels}, zs=[tokens])
            loss = denoising.mean() + 0.5 * alignment.mean()
        with clock.phase("backward"):
            loss.backward()
        with clock.phase("optimizer"):
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for ours_, theirs in zip(average, net.parameters(), strict=True):  # as its update_ema does
                    ours_.mul_(0.9999).add_(theirs.data, alpha=1 - 0.9999)
        return clock.read

    return step


def measure(step: Callable, steps: int, batch: int, device: torch.device) -> dict:
    """Medians over `steps` steps after 5 of warm-up. Host time: until the call comes back."""
    cuda = device.type == "cuda"
    for number in range(5):
        step(number)()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds, host, phases = [], [], []
    for number in range(steps):
        began = time.perf_counter()
        read = step(number + 5)
        host.append(time.perf_counter() - began)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        phases.append(read())
    middle = statistics.median(seconds)
    return {
        "images_per_second": batch / middle,
        "step_seconds": middle,
        "host_seconds": statistics.median(host),
        "phases": {name: statistics.median(p[name] for p in phases) for name in phases[0]},
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }


def peak_flops() -> float:
    """Dense bf16 peak of this GPU; infinite where it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((value for key, value in GPU_PEAK.items() if key in name), float("inf"))


if __name__ == "__main__":
    main()
