"""Normalisation of target tokens in one pass over memory: read once, past the prefix, write once. No gradient.

`layernorm` is each token over its channels (DINOv2's final norm), `spatial` each channel over its tokens (iREPA).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from repa_scale.kernels import choice, table
from torch import Tensor

# Images of one launch: CUDA's grid holds 65,535 programs along y, and the next launch begins at a multiple of 16 bytes.
IMAGES = 65535 // 8 * 8


@triton.jit(
    do_not_specialize=["rows", "tokens", "pitch", "eps", "has_affine"],
    do_not_specialize_on_alignment=["weight", "bias"],
)
def layernorm(
    x, weight, bias, out, rows, tokens, pitch, eps, has_affine,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    inside = c < WIDTH
    mask = (r < rows)[:, None] & inside[None, :]
    source = ((r // tokens).to(tl.int64) * pitch + r % tokens) * WIDTH
    v = tl.load(x + source[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(v, 1) / WIDTH
    centred = tl.where(mask, v - mean[:, None], 0.0)
    spread = tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + eps)
    w = tl.load(weight + c, mask=inside & (has_affine != 0), other=1.0)
    b = tl.load(bias + c, mask=inside & (has_affine != 0), other=0.0)
    result = centred * tl.div_rn(1.0, spread)[:, None] * w[None, :] + b[None, :]
    at = r.to(tl.int64)[:, None] * WIDTH + c[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "pitch", "gamma", "eps"])
def spatial(
    x, out, tokens, pitch, gamma, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, ROWS)
    mask = (i < tokens)[:, None] & (c < WIDTH)[None, :]
    inside = i[:, None] * WIDTH + c[None, :]  # 32 bits from the image's first element on: fewer registers
    v = tl.load(x + image * pitch * WIDTH + inside, mask=mask, other=0.0).to(tl.float32)
    # Mean first, then centred: E[x^2] - E[x]^2 cancels for DINOv2's large channels. The mean's own rounding is taken
    # out as well, so that a channel that is constant over the tokens has a deviation of 0: 1 / eps would blow it up.
    rough = tl.sum(v, 0) / tokens
    centred = tl.where(mask, v - rough[None, :], 0.0)
    rest = tl.sum(centred, 0) / tokens
    centred = tl.where(mask, centred - rest[None, :], 0.0)
    spread = tl.sqrt_rn(tl.sum(centred * centred, 0) / (tokens - 1))
    # x - gamma mean = (x - mean) + (1 - gamma) mean, so that x itself need not be kept.
    result = (centred + ((1.0 - gamma) * (rough + rest))[None, :]) * tl.div_rn(1.0, spread + eps)[None, :]
    tl.store(out + image * tokens * WIDTH + inside, result.to(out.dtype.element_ty), mask=mask)


def normalize(
    x: Tensor, kind: str, gamma: float, eps: float, out_dtype: torch.dtype, affine: tuple[Tensor, Tensor] | None
) -> Tensor:
    """(N, T, z) whose tokens are read where they stand -> (N, T, z) contiguous, in `out_dtype`."""
    n, tokens, width = x.shape
    x, pitch = table.laid_out(x)
    out = torch.empty((n, tokens, width), dtype=out_dtype, device=x.device)
    if kind == "layernorm":
        rows = n * tokens
        grid, constants, warps = table.rowwise("layernorm", rows, width, x.device)
        # Without affine their place is taken by any fp32 pointer; it is never read.
        w, b = (p.float().contiguous() for p in affine) if affine else (x.new_empty(1, dtype=torch.float32),) * 2
        arguments = (x, w, b, out, rows, tokens, pitch, eps, int(affine is not None))
        table.start(layernorm, grid, arguments, constants, warps)
    else:
        tile = table.tile("spatial", tokens, table.architecture_of(x.device))
        columns, constants = table.blocks(width, tile.columns), table.constants(width, tile)
        for first in range(0, n, IMAGES):
            part = (x, out) if n <= IMAGES else (x[first : first + IMAGES], out[first : first + IMAGES])
            grid = (columns, part[0].shape[0])
            table.start(spatial, grid, (*part, tokens, pitch, gamma, eps), constants, tile.warps)
    return out


def normalized(
    x: Tensor, kind: str, gamma: float, eps: float, out_dtype: torch.dtype, affine: tuple[Tensor, Tensor] | None
) -> Tensor:
    """`normalize`, as an operator where something traces the call."""
    weight, bias = affine or (None, None)
    if choice.untraced(x, weight, bias):
        return normalize(x, kind, gamma, eps, out_dtype, affine)
    return normalize_tokens_op(x, kind, gamma, eps, out_dtype, weight, bias)


@torch.library.custom_op("repa_scale::normalize_tokens", mutates_args=())
def normalize_tokens_op(
    x: Tensor, kind: str, gamma: float, eps: float, out_dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return normalize(x, kind, gamma, eps, out_dtype, None if weight is None else (weight, bias))


@normalize_tokens_op.register_fake
def _(x, kind, gamma, eps, out_dtype, weight, bias):
    return torch.empty(x.shape, dtype=out_dtype, device=x.device)
