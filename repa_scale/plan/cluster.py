"""The machines that a plan is made for: what a GPU, a node and its network can do. Figures of data sheets, no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields

from repa_scale.errors import ConfigError, did_you_mean
from repa_scale.flops import GPU_PEAK


@dataclass(frozen=True)
class Gpu:
    """One GPU, from the vendor's data sheet of the SXM part; rates a second, and without sparsity.

    Attributes:
        memory: bytes.
        bandwidth: bytes of memory.
        fp16, tf32, fp32: floating-point operations of matrix products (fp16: bf16 too).
        nvlink: bytes in one direction to the GPUs of the same node.
        network: Gbit/s of the node's network for each of its GPUs, as such nodes are usually built.
    """

    memory: float
    bandwidth: float
    fp16: float
    tf32: float
    fp32: float
    nvlink: float
    network: float


GPUS: dict[str, Gpu] = {
    "A100": Gpu(80e9, 2.04e12, GPU_PEAK["A100"], 156e12, 19.5e12, 300e9, 200),
    "H100": Gpu(80e9, 3.35e12, GPU_PEAK["H100"], 494e12, 67e12, 450e9, 400),
    "H200": Gpu(141e9, 4.8e12, GPU_PEAK["H200"], 494e12, 67e12, 450e9, 400),
    "B200": Gpu(180e9, 7.7e12, GPU_PEAK["B200"], 1100e12, 75e12, 900e9, 400),
}


@dataclass(frozen=True)
class Cluster:
    """What is to be booked. Each field is a key of `repa-scale plan`.

    Attributes:
        nodes, gpus: nodes, and GPUs of each.
        gpu: a row of GPUS.
        network: Gbit/s of a node's network for each of its GPUs; 0: as such nodes are usually built.
        disk: GB/s that a node writes and reads where checkpoints go.
        host: time of this host's Python against the CPU on which DeepSpeed's was measured; 0.5 is twice as fast.
        format: of the prepared images, jpeg or png.
        images: in the data set.
        price: of a GPU-hour, in any currency; 0: unknown.
    """

    nodes: int = 1
    gpus: int = 8
    gpu: str = "H100"
    network: float = 0.0
    disk: float = 2.0
    host: float = 1.0
    format: str = "jpeg"
    images: int = 1_281_167
    price: float = 0.0

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ConfigError(f"gpu={self.gpu} is not known{did_you_mean(self.gpu, GPUS)}")
        if self.format not in ("jpeg", "png"):
            raise ConfigError(f"format={self.format} must be jpeg or png, as in repa-scale prepare --format")
        for key in ("nodes", "gpus", "disk", "host", "images"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key}={getattr(self, key):g} must be above 0; give another value")
        for key in ("network", "price"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key}={getattr(self, key):g} must not be negative; give another value")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def row(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def node_network(self) -> float:
        """Bytes a second and direction between a node and the others."""
        return (self.network or self.row.network) * self.gpus * 1e9 / 8


KEYS = {field.name: {"int": int, "float": float, "str": str}[field.type] for field in fields(Cluster)}


def parse_cluster(words: list[str]) -> tuple[Cluster, list[str]]:
    """The cluster that `key=value` words describe, and the words that are not of it.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """
    values, rest = {}, []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in KEYS:
            rest.append(word)
            continue
        try:
            values[key] = KEYS[key](text)
        except ValueError:
            kind = "a whole number" if KEYS[key] is int else "a number"
            raise ConfigError(f"{key}={text} is not {kind}") from None
    return Cluster(**values), rest
