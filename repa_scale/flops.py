"""Floating-point operations of a training image, and what a GPU does of them in a second: arithmetic, no torch.

A multiply-add counts as two operations. Only matrix products are counted; the rest is below 2 % of them.
"""

from __future__ import annotations

from repa_scale.sizes import backbone, encoder_spec

# Dense bf16 peak, operations a second (the vendor's data sheets).
GPU_PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
# The share of the peak that a step's matrix products, attention and element-wise passes leave at best.
BEST_SHARE = 0.55
PROJECTOR_WIDTH = 2048
# Of a convolutional encoder up to its feature map, for each pixel of its input (counted by torch's counter).
MAP_FLOPS = {"effnet-lite0": 9697.0}
VIT_DEPTH = {384: 12, 768: 12, 1024: 24, 1280: 32, 1536: 40}


def block_flops(tokens: int, width: int, mlp_ratio: float = 4.0) -> float:
    """A transformer block's forward pass on one image: query, key, value, projection and MLP, and attention."""
    return 2 * tokens * width * width * (4 + 2 * mlp_ratio) + 4 * tokens * tokens * width


def backbone_flops(name: str, tokens: int) -> float:
    """Forward pass of a SiT on one image of `tokens` tokens. SiT-XL/2 at 256: 237e9."""
    size, _ = backbone(name)
    modulation = 2 * 6 * size.width * size.width
    return size.depth * (block_flops(tokens, size.width) + modulation)


def projector_flops(width: int, target: int, tokens: int, hidden: int = PROJECTOR_WIDTH) -> float:
    """Forward pass of the paper's three-layer projector on one image."""
    return 2 * tokens * (width * hidden + hidden * hidden + hidden * target)


def encoder_flops(name: str, tokens: int) -> float:
    """Forward pass of a target encoder on one image. DINOv2-B at 256: 46e9."""
    spec = encoder_spec(name)
    if spec.kind != "vit":
        return MAP_FLOPS[name] * tokens * spec.stride**2
    patches = 2 * tokens * 3 * spec.stride**2 * spec.width
    return VIT_DEPTH[spec.width] * block_flops(tokens + spec.prefix_tokens, spec.width) + patches


def training_flops(model: str, encoder: str | None, tokens: int) -> float:
    """Of one image: forward and twice that backward for backbone and projector, and the encoder's forward pass."""
    total = 3 * backbone_flops(model, tokens)
    if encoder:
        size, _ = backbone(model)
        total += 3 * projector_flops(size.width, encoder_spec(encoder).width, tokens) + encoder_flops(encoder, tokens)
    return total


def most_images_per_second(model: str, encoder: str | None, tokens: int, gpu: str) -> float:
    """What one GPU can train at best: an upper bound for sizing the data path, not a promise of throughput."""
    return BEST_SHARE * GPU_PEAK[gpu] / training_flops(model, encoder, tokens)
