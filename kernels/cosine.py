"""The cosine loss as two passes over memory: one forward, one backward. Triton functions, operators, autograd.

One program holds whole rows in registers. Forward it reads each operand once and keeps three numbers a row; backward it
reads each operand once and writes the gradient. There are no atomics, and every sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from repa_scale.kernels import table
from repa_scale.kernels.reference import NORM_EPS
from torch import Tensor

EPS = tl.constexpr(NORM_EPS)
GROUP = 1024  # rows of one partial sum of a mean over all rows


@triton.jit(
    do_not_specialize=["rows", "tokens", "projected_pitch", "target_pitch", "has_weight"],
    do_not_specialize_on_alignment=["weight"],
)
def cosine_forward(
    projected, target, weight, loss, scalars, rows, tokens, projected_pitch, target_pitch, has_weight,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    real = r < rows
    mask = real[:, None] & (c[None, :] < WIDTH)
    image = (r // tokens).to(tl.int64)
    of_projected = (image * projected_pitch + r % tokens) * WIDTH
    of_target = (image * target_pitch + r % tokens) * WIDTH
    x = tl.load(projected + of_projected[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(target + of_target[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    x_length = tl.sqrt_rn(tl.sum(x * x, 1))
    y_length = tl.sqrt_rn(tl.sum(y * y, 1))
    x_inverse = tl.div_rn(1.0, tl.where(x_length < EPS, EPS, x_length))
    y_inverse = tl.div_rn(1.0, tl.where(y_length < EPS, EPS, y_length))
    # Both are scaled before they meet: the product of two long rows overflows where their cosine does not.
    cosine = tl.sum((x * x_inverse[:, None]) * (y * y_inverse[:, None]), 1)
    weight_of_row = tl.load(weight + r, mask=real & (has_weight != 0), other=1.0)
    tl.store(loss + r, -cosine * weight_of_row, mask=real)
    # The gradient of a row is -(scalars[0] y - scalars[1] x). Below EPS the length is a constant.
    tl.store(scalars + r, x_inverse * y_inverse, mask=real)
    tl.store(scalars + rows + r, tl.where(x_length < EPS, 0.0, cosine * x_inverse * x_inverse), mask=real)


@triton.jit(
    do_not_specialize=["scale", "rows", "tokens", "of_group", "projected_pitch", "target_pitch", "has_weight"],
    do_not_specialize_on_alignment=["upstream", "weight"],
)
def cosine_backward(
    projected, target, weight, scalars, upstream, gradient, scale, rows, tokens, of_group, projected_pitch,
    target_pitch, has_weight, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    real = r < rows
    mask = real[:, None] & (c[None, :] < WIDTH)
    image = (r // tokens).to(tl.int64)
    of_projected = (image * projected_pitch + r % tokens) * WIDTH
    of_target = (image * target_pitch + r % tokens) * WIDTH
    x = tl.load(projected + of_projected[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(target + of_target[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    weight_of_row = tl.load(weight + r, mask=real & (has_weight != 0), other=1.0)
    factor = tl.load(upstream + r // of_group, mask=real, other=0.0) * scale * weight_of_row
    by_target = tl.load(scalars + r, mask=real, other=0.0)
    by_self = tl.load(scalars + rows + r, mask=real, other=0.0)
    # The difference first, the factor last: near cosine 1 it cancels, and must do so at full precision.
    result = -factor[:, None] * (by_target[:, None] * y - by_self[:, None] * x)
    out = r.to(tl.int64)[:, None] * WIDTH + c[None, :]
    tl.store(gradient + out, result.to(gradient.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["of_group", "values_in_all", "scale"])
def group_sums(values, sums, of_group, values_in_all, scale, COLUMNS: tl.constexpr):
    """sums[g] = scale * the sum of values[g * of_group : (g + 1) * of_group], in one order whatever the machine."""
    group = tl.program_id(0)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(0, of_group, COLUMNS):
        i = first + tl.arange(0, COLUMNS)
        at = group * of_group + i
        total += tl.load(values + at, mask=(i < of_group) & (at < values_in_all), other=0.0)
    tl.store(sums + group, tl.sum(total, 0) * scale)


def forward(projected: Tensor, target: Tensor, weight: Tensor | None, by_image: bool) -> tuple[Tensor, Tensor]:
    """The loss (N,) or () and two numbers a row (2, N T), fp32, of (N, T, z) operands and (N T,) fp32 weights."""
    n, tokens, width = projected.shape
    rows = n * tokens
    (x, x_pitch), (y, y_pitch) = table.laid_out(projected), table.laid_out(target)
    row_loss, scalars = (projected.new_empty(shape, dtype=torch.float32) for shape in (rows, (2, rows)))
    tile = table.tile("cosine", width, table.architecture_of(projected))
    tensors = (x, y, row_loss if weight is None else weight, row_loss, scalars)
    numbers = (rows, tokens, x_pitch, y_pitch, int(weight is not None))
    grid = (triton.cdiv(rows, tile.rows),)
    table.start(cosine_forward, grid, (*tensors, *numbers), table.constants(width, tile), tile.warps)
    if by_image:
        return _sums(row_loss, tokens, 1 / tokens), scalars
    return _sums(_sums(row_loss, GROUP, 1.0), triton.cdiv(rows, GROUP), 1 / rows).view(()), scalars


def backward(
    upstream: Tensor, projected: Tensor, target: Tensor, weight: Tensor | None, scalars: Tensor, by_image: bool
) -> Tensor:
    """The gradient (N, T, z) of the projected tokens, in their dtype. upstream: (N,) or () fp32."""
    n, tokens, width = projected.shape
    rows = n * tokens
    of_group = tokens if by_image else rows
    (x, x_pitch), (y, y_pitch) = table.laid_out(projected), table.laid_out(target)
    gradient = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    tile = table.tile("cosine", width, table.architecture_of(projected))
    tensors = (x, y, scalars if weight is None else weight, scalars, upstream.contiguous(), gradient)
    numbers = (1 / of_group, rows, tokens, of_group, x_pitch, y_pitch, int(weight is not None))
    grid = (triton.cdiv(rows, tile.rows),)
    table.start(cosine_backward, grid, (*tensors, *numbers), table.constants(width, tile), tile.warps)
    return gradient


def _sums(values: Tensor, of_group: int, scale: float) -> Tensor:
    """Sums of groups of `of_group` values, times `scale`. (M,) fp32 -> (ceil(M / of_group),)."""
    count = triton.cdiv(values.numel(), of_group)
    sums = values.new_empty(count)
    table.start(group_sums, (count,), (values, sums, of_group, values.numel(), scale), {"COLUMNS": GROUP}, 4)
    return sums


@torch.library.custom_op("repa_scale::cosine_loss", mutates_args=())
def cosine_loss_op(projected: Tensor, target: Tensor, weight: Tensor | None, by_image: bool) -> tuple[Tensor, Tensor]:
    return forward(projected, target, weight, by_image)


@cosine_loss_op.register_fake
def _(projected, target, weight, by_image):
    n, tokens, _ = projected.shape
    return (
        projected.new_empty((n,) if by_image else (), dtype=torch.float32),
        projected.new_empty((2, n * tokens), dtype=torch.float32),
    )


@torch.library.custom_op("repa_scale::cosine_loss_backward", mutates_args=())
def cosine_loss_backward_op(
    upstream: Tensor, projected: Tensor, target: Tensor, weight: Tensor | None, scalars: Tensor, by_image: bool
) -> Tensor:
    return backward(upstream, projected, target, weight, scalars, by_image)


@cosine_loss_backward_op.register_fake
def _(upstream, projected, target, weight, scalars, by_image):
    return torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)


def _save(ctx, inputs, output) -> None:
    projected, target, weight, ctx.by_image = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(projected, target, weight, output[1])


def _differentiate(ctx, upstream, _scalars):
    gradient = cosine_loss_backward_op(upstream, *ctx.saved_tensors, ctx.by_image)
    return gradient, None, None, None


def no_second_derivative(_ctx, *_gradients):
    """The autograd formula of every backward operator of this package."""
    raise RuntimeError("the Triton kernels have no second derivative; use kernel='torch' for it")


cosine_loss_op.register_autograd(_differentiate, setup_context=_save)
cosine_loss_backward_op.register_autograd(no_second_derivative)
