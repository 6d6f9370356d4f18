"""What determines a set of samples, bit for bit: the recipe that stands beside them. Drawing is sample_draw.py's."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from repa_scale import __version__, rng

PRECISIONS = ("fp32", "tf32", "bf16")
CLASSES = ("balanced", "random")
ROUNDING = "round((x + 1) / 2 * 255)"
COMPILE_FROM = 100_000  # images times steps: fewer are drawn in less time than compiling takes


@dataclass(frozen=True)
class Recipe:
    """Equal recipes give equal images, on any number of processes.

    Attributes:
        checkpoint: checksum of the checkpoint's or the export's manifest, which names those of its files.
        block: consecutive samples that are computed together: a matrix product's bits depend on how many they are.
        decode: of them, how many the VAE decodes at a time.
        classes: `balanced`: label = number mod classes; `random`: drawn by (seed, number), as ADM's sampler does; or
            the labels that were asked for, in turn.
        latents: name, weights and the fingerprint of their values.
        compile: by Inductor, which then chooses nothing by timing.
        device: whose arithmetic it is; versions: of what computes on it, cuBLAS and cuDNN on a GPU.
    """

    checkpoint: str
    identity_hash: str
    step: int
    weights: str
    sampler: str
    steps: int
    guidance: float
    interval: tuple[float, float]
    seed: int
    count: int
    block: int
    decode: int
    classes: str | list[int]
    num_classes: int
    image_size: int
    path: str
    latents: tuple[str, str, str]
    precision: str
    compile: bool
    rounding: str
    device: str
    versions: dict[str, str]

    @property
    def blocks(self) -> int:
        return -(-self.count // self.block)

    def size_of(self, block: int) -> int:
        """Samples of a block that are wanted: the last one may have fewer."""
        return min(self.block, self.count - block * self.block)

    def labels(self, index: Tensor) -> Tensor:
        """Labels of samples by number. (N,) int64 -> (N,) int64."""
        if not self.num_classes:
            return torch.zeros_like(index)
        if self.classes == "balanced":
            return index % self.num_classes
        if self.classes == "random":
            u = rng.uniform(self.seed, "sample label", 0, index, (), dtype=torch.float64)
            return (u * self.num_classes).long()
        return torch.tensor(self.classes, device=index.device)[index % len(self.classes)]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = asdict(self)
        name, weights, digest = values.pop("latents")
        return values | {
            "interval": list(self.interval),
            "latents": {"name": name, "weights": weights, "weights_sha256": digest},
        }


def differing(a: dict[str, Any], b: dict[str, Any]) -> str:
    """`steps: 50 -> 250, ...` for the keys that differ, the value in a before the one in b."""
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return ", ".join(f"{key}: {a.get(key)} -> {b.get(key)}" for key in keys)


def device_of(device: torch.device) -> str:
    """The kind of device: another one's products round in other places. Of a GPU: name, architecture, multiprocessors
    (a part of a GPU, too, is of another kind)."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        architecture = getattr(facts, "gcnArchName", "") or f"sm_{facts.major}{facts.minor}"
        return f"{facts.name} {architecture} {facts.multi_processor_count} SMs"
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def versions(modules: Sequence[str]) -> dict[str, str]:
    """Of this package, torch and further packages that are installed."""
    from importlib.metadata import version

    return {"repa_scale": __version__, "torch": torch.__version__} | {
        name: version(name) for name in modules if find_spec(name)
    }
