"""Seconds of a step on a GPU: formulas, and the shares of the data sheet's rates that they count with. No torch.

P: trained parameters; n: ranks; b: images a rank and forward pass; T: tokens; D: width; L: blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from repa_scale.plan.cluster import Cluster, Gpu

MATRIX_SHARE = 0.65  # of the peak, in products of a transformer of this size on an H100: 0.6 to 0.7
BANDWIDTH_SHARE = 0.88  # of the memory's, in element-wise kernels
LINK_SHARE = 0.8  # of NVLink's and the network's, in NCCL's collectives of tens of MB: a guess, not measured
# Bytes of memory traffic an element (token x D) of one block's element-wise work, in bf16: forward, backward.
ELEMENTWISE = {False: (60, 142), True: (34, 93)}  # eager, compiled
# Milliseconds of host time for 28 blocks, forward, backward and step, by ZeRO stage; blocks are leaf modules.
HOST_28 = {1: 92.0, 2: 78.0, 3: 96.0}
OPTIMIZER_BYTES = 46  # a parameter: Adam, EMA, the cast to the forward pass's weights
VAE_FLOPS = {"kl": 2 * 2.064e6, "tiny": 2 * 0.233e6, "identity": 0.0}  # a pixel


def matrix_seconds(flops: float, gpu: Gpu, precision: str) -> float:
    """Matrix products and attention, on the tensor cores of a precision (tf32: convolutions in fp32).

    Source: 65 % of the data sheet's peak (public H100 runs reach 0.6 to 0.7 in their products); inferred.
    """
    return flops / (MATRIX_SHARE * (gpu.fp16 if precision in ("bf16", "fp16") else getattr(gpu, precision)))


def elementwise_seconds(
    images: int, tokens: int, width: int, depth: int, gpu: Gpu, precision: str, compiled: bool, checkpointed: bool
) -> float:
    """Norms, modulation, GELU, residuals and biases: k L b T D bytes over the memory's bandwidth.

    Source: bytes counted by dispatch and in Inductor's generated code; k = 202 eager, 127 compiled, the forward part
    twice when checkpointed; twice that in fp32.
    """
    forward, backward = ELEMENTWISE[compiled]
    k = (forward * (2 if checkpointed else 1) + backward) * (2 if precision == "fp32" else 1)
    return k * depth * images * tokens * width / (BANDWIDTH_SHARE * gpu.bandwidth)


def vae_flops(kind: str, pixels: int) -> float:
    """Of encoding one image. Stable Diffusion's at 256 px: 271e9, more than SiT-XL/2's forward pass.

    Source: counted by torch's counter of operations: 135 GMAC at 256 px.
    """
    return VAE_FLOPS[kind] * pixels


def host_seconds(depth: int, stage: int, passes: int, host: float) -> float:
    """What Python, DeepSpeed's hooks and the launches of kernels take on the host.

    Source: measured on one CPU core with blocks of width 64: 92, 78, 96 ms for 28 blocks under stages 1, 2, 3.
    """
    return host * passes * depth * HOST_28[stage] / 28e3


def traffic_bytes(
    parameters: int, stage: int, passes: int, weight: int, communication: int, kept: bool
) -> tuple[float, float]:
    """Bytes of weights gathered and of gradients reduced in a step, before the share (n - 1) / n.

    Args:
        passes: micro batches of a step.
        weight, communication: bytes of a weight and of a gradient on the wire.
        kept: gathered weights stay between forward and backward pass (stage 3).

    Source: measured, 13 gathers a step with the weights kept and nearly twice without; stages 2 and 3 reduce in every
    micro batch, stage 1 at the last (read).
    """
    gathers = passes * (1 if kept else 2) if stage == 3 else 1
    reductions = passes if stage >= 2 else 1
    return weight * parameters * gathers, communication * parameters * reductions


def communication_seconds(volume: float, cluster: Cluster) -> float:
    """A volume of gathers and reductions over the slower of NVLink and the nodes' network.

    Source: of V bytes a rank misses V (n - 1) / n and a node V (N - 1) / N; 80 % of the links' rates, inferred.
    """
    inside = volume * (cluster.gpus - 1) / cluster.gpus / (LINK_SHARE * cluster.row.nvlink)
    between = volume * (cluster.nodes - 1) / cluster.nodes / (LINK_SHARE * cluster.node_network)
    return max(inside, between)


def optimizer_seconds(parameters: int, ranks: int, gpu: Gpu) -> float:
    """Adam, EMA and the cast of this rank's share.

    Source: 46 bytes a parameter over the memory's bandwidth; inferred.
    """
    return OPTIMIZER_BYTES * parameters / ranks / (BANDWIDTH_SHARE * gpu.bandwidth)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimiser step on every rank, by what takes them."""

    matrix: float
    elementwise: float
    frozen: float
    communication: float
    host: float
    data: float
    optimizer: float

    @property
    def limits(self) -> dict[str, float]:
        """What runs side by side: the longest decides."""
        return {
            "compute": self.matrix + self.elementwise + self.frozen,
            "communication": self.communication,
            "host": self.host,
            "data": self.data,
        }

    @property
    def seconds(self) -> float:
        """Source: max(compute, communication, host, data) + optimiser; overlap is taken to be complete."""
        return max(self.limits.values()) + self.optimizer

    @property
    def bound_by(self) -> str:
        """matrix | elementwise | frozen | communication | host | data."""
        limit = max(self.limits, key=self.limits.get)
        if limit != "compute":
            return limit
        return max(("matrix", "elementwise", "frozen"), key=lambda part: getattr(self, part))
