"""Where the host may wait for the device, or compute on a tensor of its own, in a step. Everything else is an error."""

from __future__ import annotations

import torch
from torch import Tensor

# kind, function -> why. The kinds are those of meta_device.Watched.notes.
ALLOWED: dict[tuple[str, str], str] = {
    # A step.
    ("read", "engine.step"): "the gradient norm decides whether the step counts; DeepSpeed has read it already",
    ("read", "trainer.record"): "the batch's fingerprint; the device is idle since engine.step's read",
    ("upload", "health.reduce_step"): "flags, counts and seconds of the host, on their way to the other ranks",
    ("read", "health.reduce_step"): "losses, flags and counts of all ranks, which decide how the run goes on",
    ("read", "trainer._number"): "which batch it was; behind reduce_step's read",
    ("wait", "clock.read"): "CUDA events can be read only once they are reached; behind reduce_step's read",
    (
        "upload",
        "encoders.preprocess",
    ): "mean and std of the encoder; orders nothing, to go once the streams are ordered",
    ("upload", "data.steps._each"): "labels and ids of a batch, in the feeding thread",
    ("host", "data.batches._loaded"): "the loader's seed",
    # A save.
    ("wait", "saving._copy"): "until the copies into pinned memory are complete: the next step changes the weights",
    ("read", "engine.optimizer_steps"): "AdamW's counter, for the manifest",
    # Samples: their numbers and labels are made on the host, as every rank needs all of them.
    ("host", "sample_grid.draw_blocks"): "numbers of a block's samples",
    ("host", "sample_grid.labels_of"): "labels of samples by number",
    ("host", "sample_grid.draw_grid"): "numbers of all samples, for their labels",
    ("host", "sample_grid.in_order"): "pictures of all ranks, on their way to the file",
    ("upload", "sample_grid.draw_blocks"): "numbers and labels of a block, once before its first step",
    ("read", "sample_grid.draw_grid"): "pictures",
    ("upload", "health.anywhere"): "whether to stop, before each block of samples",
    ("read", "health.anywhere"): "whether to stop, before each block of samples",
    ("host", "sampling._euler"): "the times of the steps",
    ("host", "sampling._heun"): "the times of the steps",
    ("host", "sampling._sde"): "the times of the steps",
    ("host", "sampling.reverse_drift"): "the coefficients of a step, as plain numbers",
    # Online evaluation: sums of features on the device, their distance on the host.
    ("upload", "online.measure"): "the extractor comes onto the device for the evaluation alone",
    ("read", "online.measure"): "and leaves it again: training needs the memory",
    ("host", "online._of_real"): "which of the real images",
    ("upload", "online._of_real"): "real images, once for a data set",
    ("read", "online._of_real"): "whether their features are finite",
    ("read", "online._onto_cpu"): "their moments",
    ("read", "online._of_samples"): "features of samples, on their way to the other ranks",
    ("host", "online._distance"): "the distance and its interval",
}
# Operations of a step of SiT-XL/2 with REPA, by phase (torch 2.13).
LAUNCHES: dict[str, int] = {
    "draws": 540,
    "encoder": 310,
    "latent": 122,
    "forward": 979,
    "alignment": 19,
    "backward": 1491,
    "optimizer": 619,  # 615 of them are the stand-in's copies, which DeepSpeed makes in its own way
    "record": 20,
}
# Waits of that step.
WAITS: dict[tuple[str, str], int] = {
    ("upload", "encoders.preprocess"): 2,
    ("read", "engine.step"): 1,
    ("read", "trainer.record"): 1,
    ("upload", "health.reduce_step"): 1,
    ("read", "health.reduce_step"): 1,
    ("read", "trainer._number"): 1,
    ("wait", "clock.read"): 1,
}


def spread(shape: tuple[int, ...]) -> Tensor:
    """Features and their moments with a distance: zeros have no covariance."""
    square = len(shape) == 2 and shape[0] == shape[1]
    return torch.eye(shape[0]) if square else torch.linspace(0, 1, shape.numel()).view(shape)


# What a read gives where 0 would end the walk.
ANSWERS: dict[str, object] = {
    "online._of_real": True,
    "online._of_samples": spread,
    "online._onto_cpu": spread,
}
