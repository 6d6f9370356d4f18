"""Bytes on a rank: formulas of the state, of what a step holds, and of the frozen networks. No torch.

P: trained parameters; n: ranks; b: images a rank and forward pass; T: tokens; D: width; L: blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

COMPUTE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # of a weight in the forward pass, and of an activation
MASTER, MOMENTS, EMA = 4, 8, 4  # fp32
# What a block keeps of each token for its backward pass, in units of D, at 2 bytes an element.
SAVED_EAGER, SAVED_COMPILED, SAVED_CHECKPOINTED, BACKWARD = 40, 34, 2, 9
VAE_BYTES = {"kl": 4 * 83_653_863, "tiny": 4 * 2_445_063, "identity": 0}  # in fp32 (frozen.py)
VAE_PEAK = {"kl": 2560, "tiny": 780, "identity": 0}  # bytes a pixel while it encodes
RUNTIME = 1.5e9


def state_bytes(parameters: int, ranks: int, stage: int, precision: str, gradients: int) -> dict[str, float]:
    """What stays on a rank from step to step, by part.

    Args:
        stage: of ZeRO: 1 shards master weights, moments and EMA; 2 the gradients too; 3 the weights too.
        gradients: bytes of an accumulated gradient (grad_accum_dtype).

    Between two steps stage 2 does not keep its gradients.

    Source: measured, benchmarks/zero_memory.py (stage 3, 1 to 4 processes: 0.0 % off).
    """
    shard = parameters / ranks
    return {
        "weights": COMPUTE_BYTES[precision] * (shard if stage == 3 else parameters),
        "gradients": gradients * (shard if stage >= 2 else parameters),
        "master": MASTER * shard,
        "moments": MOMENTS * shard,
        "ema": EMA * shard,
    }


def gathered_bytes(parameters: int, stage: int, precision: str, kept: bool, blocks: int) -> float:
    """Weights of other ranks that stage 3 holds in a step: all of them when kept between the passes, else two blocks'.

    Source: measured, stage3_max_live_parameters at twice the parameters keeps them.
    """
    if stage < 3:
        return 0.0
    return COMPUTE_BYTES[precision] * (parameters if kept else 2 * parameters / blocks)


def bucket_bytes(parameters: int, bucket: int, communication: int) -> float:
    """The buffer in which gradients are sent, and its copy in the order of the ranks.

    Args:
        bucket: reduce_bucket_size, elements.
        communication: bytes of an element (communication_data_type).

    Source: measured, benchmarks/zero_memory.py; the copy is read in DeepSpeed's reduce_scatter_coalesced, and measured.
    """
    return 2 * communication * min(bucket, parameters)


def activation_bytes(
    images: int, tokens: int, width: int, depth: int, precision: str, compiled: bool, checkpointed: bool
) -> float:
    """What the blocks keep for the backward pass of one micro batch.

    Source: counted by dispatch: 40 D bytes a token and block eager in bf16, 34 D compiled, 80 D in fp32; checkpointed
    2 D, and one block whole with the 9 D that its backward pass makes (which are small beside all blocks' otherwise).
    """
    one = images * tokens * width * COMPUTE_BYTES[precision] / 2
    whole = SAVED_COMPILED if compiled else SAVED_EAGER
    return one * (depth * SAVED_CHECKPOINTED + whole + BACKWARD if checkpointed else depth * whole)


def projector_bytes(images: int, tokens: int, hidden: int, target: int, precision: str, fused: bool) -> float:
    """What one three-layer projector and its cosine keep for the backward pass.

    Source: counted: 166 MB at 8,192 rows of 2048 and 768 in bf16 (four activations and the cosine's), 67 MB less with
    the Triton kernel.
    """
    rows = images * tokens
    return rows * COMPUTE_BYTES[precision] * ((2 if fused else 4) * hidden + 2.5 * target)


def step_bytes(parameters: int, ranks: int) -> float:
    """What the optimiser step makes for itself: the rank's gradients once more, in fp32.

    Source: read, DeepSpeed flattens them into one tensor before the step.
    """
    return 4 * parameters / ranks


def vae_bytes(kind: str, images: int, pixels: int) -> tuple[float, float]:
    """A frozen VAE's weights, and the most that encoding a micro batch holds, both in fp32.

    Args:
        pixels: of an image.

    Source: counted by dispatch 2,560 bytes a pixel for Stable Diffusion's encoder, 780 for the tiny one.
    """
    return VAE_BYTES[kind], VAE_PEAK[kind] * images * pixels


def vit_parameters(width: int, depth: int) -> float:
    """Of a frozen ViT encoder. DINOv2-B: 86e6.

    Source: 12 D^2 a block; embeddings and norms are below 2 %.
    """
    return 12 * width * width * depth


def vit_bytes(width: int, depth: int, images: int, tokens: int, precision: str) -> tuple[float, float]:
    """A frozen ViT's weights, and the most that a forward pass holds: a block's tokens and its MLP.

    Source: counted by dispatch on DINOv2-B and L: 13 D elements a token.
    """
    size = COMPUTE_BYTES[precision]
    return size * vit_parameters(width, depth), size * 13 * images * tokens * width


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank; `peak` is the highest point of a step."""

    state: dict[str, float]
    gathered: float
    buckets: float
    activations: float
    optimizer: float
    frozen_weights: float
    frozen_work: float
    runtime: float = RUNTIME  # CUDA's context, NCCL's buffers, the allocator's rounding: a guess, not measured

    @property
    def passes(self) -> float:
        """What the forward and backward pass hold beyond the state."""
        return self.gathered + self.buckets + self.activations

    @property
    def peak(self) -> float:
        """The frozen networks run before the passes, the optimiser after them: the largest of the three counts."""
        beyond = max(self.passes, self.frozen_work, self.optimizer)
        return sum(self.state.values()) + self.frozen_weights + self.runtime + beyond
