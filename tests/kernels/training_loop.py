"""A short training under ZeRO-3 in this process, on made-up latents and targets."""

from __future__ import annotations

import torch
from torch import Tensor

from repa_scale.config import Config
from repa_scale.deepspeed_config import deepspeed_dict
from repa_scale.engine import Engine
from repa_scale.models.initial import initial_values
from repa_scale.objective import build_objective, total
from repa_scale.ranks import Ranks

BATCH, Z, SAMPLES = 16, 768, 64


def curve(
    kernel: str,
    device: str,
    steps: int,
    precision: str,
    model: str = "SiT-S/2",
    checkpointing: bool = False,
    compile: bool = False,
    batch: int = BATCH,
) -> Tensor:
    """The total loss of each step, (steps,) float64, on the same batches for every kernel."""
    config = Config()
    config.model.name, config.train.precision, config.train.global_batch = model, precision, batch
    config.alignment["repa"].depth, config.alignment_kernel = 1, kernel
    ranks = Ranks.from_environment(device)
    ranks.start()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_objective(config).parameters())
    engine = Engine(
        lambda: build_objective(config),
        deepspeed_dict(config, 1, parameters, ranks.device.type),
        ranks,
        learning_rate=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        compile=compile,
        checkpointing=checkpointing,
    )
    engine.write(lambda name, shape, start, stop: initial_values(name, shape, start, stop, 0))
    generator = torch.Generator().manual_seed(0)
    tokens = engine.module.model.grid**2
    x0, targets = (torch.randn(SAMPLES, *shape, generator=generator) for shape in ((4, 32, 32), (tokens, Z)))
    losses = []
    for _ in range(steps):
        chosen = torch.randint(0, SAMPLES, (batch,), generator=generator)
        noise, t = torch.randn(batch, 4, 32, 32, generator=generator), torch.rand(batch, generator=generator)
        at = t.view(-1, 1, 1, 1)
        x_t = (1 - at) * x0[chosen] + at * noise
        inputs = (x_t, t, chosen, noise - x0[chosen], targets[chosen])
        x_t, t, labels, velocity, target = (value.to(ranks.device) for value in inputs)
        loss = total(engine(x_t, t, labels, velocity, {"repa": target}), {"repa": 0.5})
        engine.backward(loss)
        engine.step(1e-4)
        losses.append(loss.detach().double())
    engine.close()
    return torch.stack(losses).cpu()
