"""The cosine loss as two passes over memory: one forward, one backward. Triton functions, operators, autograd.

One program holds whole rows in registers. Forward it reads each operand once and keeps three numbers a row; backward it
reads each operand once and writes the gradient. There are no atomics, and every sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from repa_scale.kernels import choice, table
from repa_scale.kernels.reference import NORM_EPS
from torch import Tensor

EPS = tl.constexpr(NORM_EPS)


@triton.jit(
    do_not_specialize=["rows", "tokens", "projected_pitch", "target_pitch", "has_weight"],
    do_not_specialize_on_alignment=["weight"],
)
def cosine_forward(
    projected, target, weight, scalars, rows, tokens, projected_pitch, target_pitch, has_weight,
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
    # scalars[0] is a row's loss; its gradient is -(scalars[1] y - scalars[2] x). Below EPS the length is a constant.
    tl.store(scalars + r, -cosine * weight_of_row, mask=real)
    tl.store(scalars + rows + r, x_inverse * y_inverse, mask=real)
    tl.store(scalars + rows + rows + r, tl.where(x_length < EPS, 0.0, cosine * x_inverse * x_inverse), mask=real)


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
    by_target = tl.load(scalars + rows + r, mask=real, other=0.0)
    by_self = tl.load(scalars + rows + rows + r, mask=real, other=0.0)
    # The difference first, the factor last: near cosine 1 it cancels, and must do so at full precision.
    result = -factor[:, None] * (by_target[:, None] * y - by_self[:, None] * x)
    out = r.to(tl.int64)[:, None] * WIDTH + c[None, :]
    tl.store(gradient + out, result.to(gradient.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["of_group", "scale"])
def group_sums(values, sums, of_group, scale, COLUMNS: tl.constexpr):
    """sums[g] = scale * the sum of values[g * of_group : (g + 1) * of_group], in one order whatever the machine."""
    group = tl.program_id(0)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(0, of_group, COLUMNS):
        i = first + tl.arange(0, COLUMNS)
        total += tl.load(values + group * of_group + i, mask=i < of_group, other=0.0)
    tl.store(sums + group, tl.sum(total, 0) * scale)


def forward(projected: Tensor, target: Tensor, weight: Tensor | None, by_image: bool) -> tuple[Tensor, Tensor]:
    """The loss (N,) or () and three numbers a row (3, N T), fp32, of (N, T, z) operands and (N T,) fp32 weights."""
    n, tokens, width = projected.shape
    rows, device = n * tokens, projected.device
    (x, x_pitch), (y, y_pitch) = table.laid_out(projected), table.laid_out(target)
    scalars = torch.empty((3, rows), dtype=torch.float32, device=device)
    loss = torch.empty((n,) if by_image else (), dtype=torch.float32, device=device)
    grid, constants, warps = table.rowwise("cosine", rows, width, device)
    has_weight = weight is not None
    arguments = (x, y, weight if has_weight else scalars, scalars, rows, tokens, x_pitch, y_pitch, int(has_weight))
    table.start(cosine_forward, grid, arguments, constants, warps)
    sums, groups, of_group = (table.SUM_OF_IMAGE, n, tokens) if by_image else (table.SUM_OF_ALL, 1, rows)
    arguments = (scalars, loss, of_group, 1 / of_group)
    table.start(group_sums, (groups,), arguments, {"COLUMNS": sums.columns}, sums.warps)
    return loss, scalars


def backward(
    upstream: Tensor, projected: Tensor, target: Tensor, weight: Tensor | None, scalars: Tensor, by_image: bool
) -> Tensor:
    """The gradient (N, T, z) of the projected tokens, in their dtype. upstream: (N,) or () fp32."""
    n, tokens, width = projected.shape
    rows = n * tokens
    of_group = tokens if by_image else rows
    (x, x_pitch), (y, y_pitch) = table.laid_out(projected), table.laid_out(target)
    gradient = torch.empty_like(projected, memory_format=torch.contiguous_format)
    grid, constants, warps = table.rowwise("cosine", rows, width, projected.device)
    has_weight = weight is not None
    arguments = (
        x, y, weight if has_weight else scalars, scalars, upstream.contiguous(), gradient,
        1 / of_group, rows, tokens, of_group, x_pitch, y_pitch, int(has_weight),
    )  # fmt: skip
    table.start(cosine_backward, grid, arguments, constants, warps)
    return gradient


def loss_of(projected: Tensor, target: Tensor, weight: Tensor | None, by_image: bool) -> Tensor:
    """`forward`'s loss, differentiable; as an operator where something traces the call."""
    if not choice.untraced(projected, target, weight):
        return cosine_loss_op(projected, target, weight, by_image)[0]
    return apply_loss(projected, target, weight, by_image)


@torch.library.custom_op("repa_scale::cosine_loss", mutates_args=())
def cosine_loss_op(projected: Tensor, target: Tensor, weight: Tensor | None, by_image: bool) -> tuple[Tensor, Tensor]:
    return forward(projected, target, weight, by_image)


@cosine_loss_op.register_fake
def _(projected, target, weight, by_image):
    n, tokens, _ = projected.shape
    return (
        projected.new_empty((n,) if by_image else (), dtype=torch.float32),
        projected.new_empty((3, n * tokens), dtype=torch.float32),
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
    ctx.set_materialize_grads(False)  # else the backward pass gets zeros as large as each output, nobody's gradient
    ctx.save_for_backward(projected, target, weight, output[1])


def _differentiate(ctx, upstream, _scalars=None):
    if upstream is None:
        return None, None, None, None
    saved = ctx.saved_tensors
    # With a graph of the gradient it is the operator's part to refuse a second derivative.
    run = backward if not torch.is_grad_enabled() and choice.untraced(upstream) else cosine_loss_backward_op
    return run(upstream, *saved, ctx.by_image), None, None, None


class Loss(torch.autograd.Function):
    """What the operator does, called directly: its dispatch takes the host longer than a small kernel takes."""

    @staticmethod
    def forward(ctx, projected, target, weight, by_image):
        loss, scalars = forward(projected, target, weight, by_image)
        ctx.by_image = by_image
        ctx.save_for_backward(projected, target, weight, scalars)
        return loss

    backward = staticmethod(_differentiate)


apply_loss = choice.apply_of(Loss)


def no_second_derivative(_ctx, *_gradients):
    """The autograd formula of every backward operator of this package."""
    raise RuntimeError("the Triton kernels have no second derivative; use kernel='torch' for it")


cosine_loss_op.register_autograd(_differentiate, setup_context=_save)
cosine_loss_backward_op.register_autograd(no_second_derivative)
