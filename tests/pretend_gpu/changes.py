"""Changes of the program that a test asks for by name: mistakes that were made once, and a compiler without CUDA."""

from __future__ import annotations

import functools


def buffers_stay() -> None:
    """Under stage 3 nobody moves the buffers: `zero.Init` moves parameters alone."""
    from repa_scale import engine

    place = engine.place
    engine.place = lambda objective, device, stage: place(objective, device, stage) if stage < 3 else None


def host_scalar() -> None:
    """One of the step's means is a number of the host."""
    from repa_scale import trainer

    reduce_step = trainer.reduce_step
    trainer.reduce_step = lambda ranks, means, *rest: reduce_step(ranks, [*means[:-1], means[-1].cpu()], *rest)


def aot_eager() -> None:
    """`torch.compile` traces and differentiates, and leaves out Inductor, which would compile for CUDA."""
    import torch

    torch.compile = functools.partial(torch.compile, backend="aot_eager")
