"""The paper's projector (Linear-SiLU-Linear-SiLU-Linear) and the cosine loss as one differentiable operator.

The matrix products are cuBLAS's. What is saved is the input, both pre-activations and the output: SiLU is recomputed
in the backward pass, in the kernel that takes its gradient and sums that of the bias. The weights are saved as the
parameters themselves, never as views or casts: under ZeRO-3 they are gathered again when the backward pass begins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from repa_scale.kernels import choice, cosine, table
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def silu_backward(
    gradient, before, after, sums, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (r < rows)[:, None] & (c < WIDTH)[None, :]
    block = tl.program_id(0).to(tl.int64)
    first = block * ROWS * WIDTH
    at = tl.arange(0, ROWS)[:, None] * WIDTH + c[None, :]
    h = tl.load(before + first + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gradient + first + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.div_rn(1.0, 1.0 + tl.exp(-h))
    g = (g * sigmoid * (1.0 + h * (1.0 - sigmoid))).to(gradient.dtype.element_ty)
    tl.store(gradient + first + at, g, mask=mask)
    tl.store(after + first + at, (h * sigmoid).to(after.dtype.element_ty), mask=mask)
    tl.store(sums + block * WIDTH + c, tl.sum(g.to(tl.float32), 0), mask=c < WIDTH)


def through_silu(gradient: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The backward step through a = SiLU(h). Overwrites `gradient` (R, K), of a, with that of `before`, h.

    Returns:
        a (R, K), recomputed; and the sums of the new gradient over the rows, (K,) fp32: the gradient of h's bias.
    """
    rows, width = before.shape
    after = torch.empty_like(before)
    tile = table.tile("silu", 1, table.architecture_of(before.device))
    blocks = table.blocks(rows, tile.rows)
    sums = before.new_empty((blocks, width), dtype=torch.float32)
    grid = (blocks, table.blocks(width, tile.columns))
    arguments = (gradient, before, after, sums, rows)
    table.start(silu_backward, grid, arguments, table.constants(width, tile), tile.warps)
    return after, sums.sum(0)


def forward(
    hidden: Tensor, parameters: list[Tensor], target: Tensor, weight: Tensor | None, by_image: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and scalars as of `cosine.forward`, both pre-activations (R, K) and the output (N, T, z) in `dtype`.

    Args:
        hidden: (N, T, D).
        parameters: weight and bias of the three Linears.
        dtype: of the products.
    """
    w1, b1, w2, b2, w3, b3 = (p.to(dtype) for p in parameters)
    # addmm, not F.linear: DeepSpeed may have put its own autograd function in that place.
    first = torch.addmm(b1, _rows(hidden).to(dtype), w1.t())
    second = torch.addmm(b2, F.silu(first), w2.t())
    output = torch.addmm(b3, F.silu(second), w3.t()).view(*hidden.shape[:2], -1)
    loss, scalars = cosine.forward(output, target, weight, by_image)
    return loss, scalars, first, second, output


def backward(
    upstream: Tensor,
    hidden: Tensor,
    weights: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    saved: list[Tensor],
    by_image: bool,
) -> list[Tensor]:
    """Gradients of hidden (N, T, D) and of the six parameters: weights in the products' dtype, biases in fp32.

    Args:
        upstream: as of `cosine.backward`.
        weights: of the three Linears.
        saved: scalars, pre-activations and output of `forward`.
    """
    scalars, first, second, output = saved
    w1, w2, w3 = (w.to(output.dtype) for w in weights)
    g3 = _rows(cosine.backward(upstream, output, target, weight, scalars, by_image))
    g2 = g3 @ w3
    after, b2 = through_silu(g2, second)
    w3, b3 = g3.t() @ after, g3.sum(0, dtype=torch.float32)
    del after, g3
    g1 = g2 @ w2
    after, b1 = through_silu(g1, first)
    w2 = g2.t() @ after
    del after, g2
    g0 = (g1 @ w1).view(hidden.shape)
    return [g0, g1.t() @ _rows(hidden).to(g1.dtype), b1, w2, b2, w3, b3]


def in_chunks(
    hidden: Tensor,
    parameters: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    chunk: int,
    with_gradients: bool,
) -> list[Tensor]:
    """The loss summed over all rows, and its gradients, `chunk` images at a time: what a chunk needs is freed after it.

    Returns:
        () fp32; then, or empty, the gradients: of hidden in its dtype, of the parameters in fp32. They belong to the
        sum of the rows' losses, not to the mean: divided by the number of rows they would be lost to fp16.
    """
    n, tokens, _ = hidden.shape
    total = hidden.new_zeros((), dtype=torch.float32)
    shapes = [p.shape if with_gradients else (0,) for p in (hidden, *parameters)]
    gradients = [hidden.new_empty(shapes[0])]
    gradients += [hidden.new_zeros(shape, dtype=torch.float32) for shape in shapes[1:]]
    for begin in range(0, n, chunk):
        part = slice(begin, begin + chunk)
        rows = slice(begin * tokens, (begin + chunk) * tokens)
        inputs = (target[part], None if weight is None else weight[rows].contiguous())
        loss, *saved = forward(hidden[part], parameters, *inputs, True, dtype)
        total += loss.sum() * tokens
        if with_gradients:
            upstream = torch.full_like(loss, tokens)
            first, *others = backward(upstream, hidden[part], parameters[::2], *inputs, saved, True)
            gradients[0][part] = first
            for sum_so_far, gradient in zip(gradients[1:], others, strict=True):
                sum_so_far += gradient
    return [total, *gradients]


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def loss_of(
    hidden: Tensor, parameters: list[Tensor], target: Tensor, weight: Tensor | None, by_image: bool, dtype: torch.dtype
) -> Tensor:
    """`forward`'s loss, differentiable; as an operator where something traces the call."""
    if choice.untraced(hidden, target, weight, *parameters):
        return apply_loss(hidden, target, weight, by_image, dtype, *parameters)
    return projector_loss_op(hidden, parameters, target, weight, by_image, dtype)[0]


def loss_in_chunks_of(
    hidden: Tensor,
    parameters: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    chunk: int,
    with_gradients: bool,
) -> Tensor:
    """The sum of `in_chunks`, differentiable; as an operator where something traces the call."""
    if choice.untraced(hidden, target, weight, *parameters):
        return apply_loss_in_chunks(hidden, target, weight, dtype, chunk, with_gradients, *parameters)
    return projector_loss_in_chunks_op(hidden, parameters, target, weight, dtype, chunk, with_gradients)[0]


# Called directly: what the operators do, without their dispatch. In both autocast is off: the products' dtype is an
# argument.


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, target, weight, by_image, dtype, *parameters):
        with torch.autocast(hidden.device.type, enabled=False):
            output = forward(hidden, parameters, target, weight, by_image, dtype)
        ctx.by_image = by_image
        ctx.save_for_backward(hidden, *parameters, target, weight, *output[1:])
        return output[0]

    @staticmethod
    def backward(ctx, upstream):
        hidden, parameters, *others = _differentiate(ctx, upstream)
        return hidden, *others, *parameters


class LossInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, target, weight, dtype, chunk, with_gradients, *parameters):
        with torch.autocast(hidden.device.type, enabled=False):
            output = in_chunks(hidden, parameters, target, weight, dtype, chunk, with_gradients)
        ctx.dtypes = [p.dtype for p in (hidden, *parameters)]
        ctx.save_for_backward(*output[1:])
        return output[0]

    @staticmethod
    def backward(ctx, upstream):
        hidden, parameters, *others = _scale_gradients(ctx, [upstream])
        return hidden, *others, *parameters


apply_loss, apply_loss_in_chunks = choice.apply_of(Loss), choice.apply_of(LossInChunks)


# The operators.


@torch.library.custom_op("repa_scale::projector_loss", mutates_args=())
def projector_loss_op(
    hidden: Tensor, parameters: list[Tensor], target: Tensor, weight: Tensor | None, by_image: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(hidden, parameters, target, weight, by_image, dtype)


@projector_loss_op.register_fake
def _(hidden, parameters, target, weight, by_image, dtype):
    n, tokens, _ = hidden.shape
    first, second, output = ((n * tokens, w.shape[0]) for w in parameters[::2])
    return (
        hidden.new_empty((n,) if by_image else (), dtype=torch.float32),
        hidden.new_empty((3, n * tokens), dtype=torch.float32),
        hidden.new_empty(first, dtype=dtype),
        hidden.new_empty(second, dtype=dtype),
        hidden.new_empty((n, tokens, output[1]), dtype=dtype),
    )


@torch.library.custom_op("repa_scale::projector_loss_backward", mutates_args=())
def projector_loss_backward_op(
    upstream: Tensor,
    hidden: Tensor,
    weights: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    saved: list[Tensor],
    by_image: bool,
) -> list[Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        return backward(upstream, hidden, weights, target, weight, saved, by_image)


@projector_loss_backward_op.register_fake
def _(upstream, hidden, weights, target, weight, saved, by_image):
    dtype = saved[-1].dtype
    gradients = [hidden.new_empty(hidden.shape, dtype=dtype)]
    for w in weights:
        gradients += [w.new_empty(w.shape, dtype=dtype), w.new_empty(w.shape[:1], dtype=torch.float32)]
    return gradients


@torch.library.custom_op("repa_scale::projector_loss_in_chunks", mutates_args=())
def projector_loss_in_chunks_op(
    hidden: Tensor,
    parameters: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    chunk: int,
    with_gradients: bool,
) -> list[Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        return in_chunks(hidden, parameters, target, weight, dtype, chunk, with_gradients)


@projector_loss_in_chunks_op.register_fake
def _(hidden, parameters, target, weight, dtype, chunk, with_gradients):
    shapes = [p.shape if with_gradients else (0,) for p in (hidden, *parameters)]
    gradients = [hidden.new_empty(shapes[0])]
    gradients += [hidden.new_empty(shape, dtype=torch.float32) for shape in shapes[1:]]
    return [hidden.new_empty((), dtype=torch.float32), *gradients]


def _save(ctx, inputs, output) -> None:
    hidden, parameters, target, weight, ctx.by_image, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else the backward pass gets zeros as large as each output, nobody's gradient
    ctx.save_for_backward(hidden, *parameters, target, weight, *output[1:])


def _differentiate(ctx, upstream, *_others):
    if upstream is None:
        return None, [None] * 6, None, None, None, None
    kept = ctx.saved_tensors  # read once: under activation checkpointing a second look is an error
    (hidden, *parameters), (target, weight, *saved) = kept[:7], kept[7:]
    inputs = (upstream, hidden, parameters[::2], target, weight, saved, ctx.by_image)
    # With a graph of the gradient it is the operator's part to refuse a second derivative.
    if not torch.is_grad_enabled() and choice.untraced(upstream):
        with torch.autocast(hidden.device.type, enabled=False):
            found = backward(*inputs)
    else:
        found = projector_loss_backward_op(*inputs)
    gradients = [g.to(p.dtype) for g, p in zip(found, (hidden, *parameters), strict=True)]
    return gradients[0], gradients[1:], None, None, None, None


def _save_gradients(ctx, inputs, output) -> None:
    hidden, parameters, *_ = inputs
    ctx.dtypes = [p.dtype for p in (hidden, *parameters)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx, upstream):
    if upstream[0] is None:
        return None, [None] * 6, None, None, None, None, None
    if torch.is_grad_enabled():  # what was saved hangs on no input: a second derivative would be a silent zero
        cosine.no_second_derivative(ctx)
    scaled = [(g * upstream[0]).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
    return scaled[0], scaled[1:], None, None, None, None, None


projector_loss_op.register_autograd(_differentiate, setup_context=_save)
projector_loss_backward_op.register_autograd(cosine.no_second_derivative)
projector_loss_in_chunks_op.register_autograd(_scale_gradients, setup_context=_save_gradients)
