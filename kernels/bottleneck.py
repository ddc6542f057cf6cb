"""Bottleneck adapters for many users in one packed batch.

    y[t] = r[t] + s_u (Wu_u h[t] + bu_u)      h[t] = act(z[t])      z[t] = Wd_u x[t] + bd_u      slot u owns row t

Houlsby et al. 2019 (arXiv:1902.00751), section 2.1. A serial adapter adds to its own input, r = x. Where the two differ
r is a tensor of its own: Pfeiffer et al. 2021 (arXiv:2005.00247) read normalised rows and add to the rows before, a
parallel adapter (He et al. 2022, arXiv:2110.04366) reads a block's input and adds to its output. Gradients, per segment
of slot u, with q the gradient of z and * elementwise:

    q[t]    = s (Wu^T grad_y[t]) * act'(z[t])        grad_Wd   = sum_t q[t] x[t]^T           grad_bd = sum_t q[t]
    grad_x  = Wd^T q  (serial: + grad_y)             grad_Wu^T = sum_t s h[t] grad_y[t]^T    grad_bu = sum_t s grad_y[t]
    grad_r  = grad_y

`up` holds Wu transposed, so both matrices are rank-major [U, F, K], like LoRA's, and every product is a shrink
(K -> F), an expand (F -> K) or a weight gradient.

Programs and rows. A program has a tile, up to BLOCK_T rows of one segment from the segment's own first row, and does
both products of its rows: z and h stay in registers in between, and x is read from memory once (a serial residual a
second time, from the L2 cache). Forward keeps z and not h: h is one function away, and the backward program, which has
z in hand for act', writes s h beside q for the weight gradients. Those are wgrad.py's: sums over a segment's own rows,
in their own order. A bias is the weight of an input that is always 1, so its gradient is a weight gradient against a
column of ones; a kernel for sums alone would read the same bytes. No sum crosses users and block sizes depend on F
alone, so a user's bits do not depend on the company; on a CPU, where libraries multiply, the last ones may.

Bytes, with e per number: forward e * T * (2 K + F), with r 3 K; backward e * T * (5 K + 6 F), of which grad_y three
times, x and grad_x; per slot that has rows, e * 2 F K in each direction and 4 * 2 F K for the gradients. In bf16 that
is F FLOPs per byte: the kernels wait for memory up to an F of about 180.

`segment_bottleneck` is the op by itself, for tests and for readers. Training calls `bottleneck_rows`
(bottleneck_rows.py): the same `Bottleneck`, forward and backward, on some of a batch's rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minipeft_kernels import cpu
from minipeft_kernels.activations import ACTIVATIONS, act, act_slope
from minipeft_kernels.backend import backend
from minipeft_kernels.blocks import load_block, my_ranks, my_rows
from minipeft_kernels.dtypes import constexpr_function, jit, padded, rounded, store, tl
from minipeft_kernels.layouts import check_dtype, check_grads, check_no_grad, check_slots, check_table
from minipeft_kernels.segments import Segments, take
from minipeft_kernels.wgrad import wgrad

MAX_F = 256  # a program holds z of its rows in registers

# ---- Kernels -------------------------------------------------------------------------------------------------------


@constexpr_function
def columns(F, bits):
    """Columns that a program works on at a time, for a width and bits per number; see `configuration`."""
    if bits > 16:
        return 32 if F <= 128 else 16
    return 128 if F <= 32 else 64 if F <= 128 else 32


@jit
def _store_block(ptr, rows, row_ok, first_col, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store y as columns first_col .. first_col + BLOCK - 1 of these rows: load_block the other way."""
    cols = first_col + tl.arange(0, BLOCK)
    ok = row_ok[:, None]
    if WIDTH % BLOCK != 0:
        ok = ok & (cols < WIDTH)[None, :]
    store(ptr + rows[:, None] * WIDTH + cols[None, :], y, ok)


@jit
def _forward_kernel(
    x_ptr, residual_ptr, y_ptr, z_ptr,  # [T, K], [T, K], [T, K], [T, F]
    down_ptr, down_bias_ptr, up_ptr, up_bias_ptr,  # [U, F, K], [U, F], [U, F, K], [U, K]
    tiles_ptr, segments_ptr, scale_ptr, widths_ptr,  # [n, 2], [S, 3], [U] or None: 1, [U] or None: all F
    down_stride, down_bias_stride, up_stride, up_bias_stride,  # numbers between slots
    K: tl.constexpr, F: tl.constexpr, ACT: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """z = Wd x + bd; y = r + s (Wu act(z) + bu). One program = BLOCK_T rows of one segment, so it sees one user."""
    # 1. Which rows are mine, whose are they, and how wide is that user's bottleneck?
    INNER: tl.constexpr = padded(F)
    BLOCK: tl.constexpr = columns(F, x_ptr.dtype.element_ty.primitive_bitwidth)
    _, rows, row_ok, _, slot = my_rows(tiles_ptr, segments_ptr, BLOCK_T)
    inner, used = my_ranks(widths_ptr, slot, F, 1)
    down_ptr += slot * down_stride
    up_ptr += slot * up_stride
    up_bias_ptr += slot * up_bias_stride
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + slot)

    # 2. Shrink, in fp32. From here on z is what memory holds of it: backward will see the same.
    acc = tl.zeros((BLOCK_T, INNER), tl.float32)
    for k in range(0, K, BLOCK):
        x = load_block(x_ptr, rows, row_ok, K, k, K, BLOCK)  # [BLOCK_T, BLOCK]
        down = load_block(down_ptr, inner, used, K, k, K, BLOCK)  # [INNER, BLOCK]
        acc = tl.dot(x, tl.trans(down), acc, input_precision="ieee")
    acc += tl.load(down_bias_ptr + slot * down_bias_stride + inner, used, other=0.0).to(tl.float32)[None, :]
    _store_block(z_ptr, rows, row_ok, 0, acc, F, INNER)
    z = rounded(acc, z_ptr.dtype.element_ty).to(tl.float32)

    # 3. Activation, expand, bias, residual.
    h = rounded(act(z, ACT), z_ptr.dtype.element_ty)
    for k in range(0, K, BLOCK):
        cols = k + tl.arange(0, BLOCK)
        up = load_block(up_ptr, inner, used, K, k, K, BLOCK)
        up_bias = tl.load(up_bias_ptr + cols, cols < K, other=0.0).to(tl.float32)
        residual = load_block(residual_ptr, rows, row_ok, K, k, K, BLOCK).to(tl.float32)
        y = residual + scale * up_bias[None, :] + scale * tl.dot(h, up, input_precision="ieee")
        _store_block(y_ptr, rows, row_ok, k, y, K, BLOCK)


@jit
def _backward_kernel(
    grad_y_ptr, z_ptr, grad_x_ptr, grad_z_ptr,  # [T, K], [T, F], [T, K] or None: not wanted, [T, F]
    scaled_h_ptr, scale_rows_ptr,  # [T, F], [T] or None: scale is None
    down_ptr, up_ptr,  # [U, F, K], [U, F, K]
    tiles_ptr, segments_ptr, scale_ptr, widths_ptr,  # as in _forward_kernel
    down_stride, up_stride,
    K: tl.constexpr, F: tl.constexpr, ACT: tl.constexpr, SERIAL: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """q = s (Wu^T grad_y) * act'(z), s h, and s of every row; grad_x = Wd^T q. Programs as in _forward_kernel."""
    # 1. Which rows?
    INNER: tl.constexpr = padded(F)
    BLOCK: tl.constexpr = columns(F, z_ptr.dtype.element_ty.primitive_bitwidth)
    _, rows, row_ok, _, slot = my_rows(tiles_ptr, segments_ptr, BLOCK_T)
    inner, used = my_ranks(widths_ptr, slot, F, 1)
    down_ptr += slot * down_stride
    up_ptr += slot * up_stride
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + slot)
        store(scale_rows_ptr + rows, tl.zeros((BLOCK_T,), tl.float32) + scale, row_ok)

    # 2. s h, for the gradient of up. Before the sums: registers hold the temporaries of one or the other.
    z = load_block(z_ptr, rows, row_ok, F, 0, F, INNER).to(tl.float32)
    _store_block(scaled_h_ptr, rows, row_ok, 0, scale * act(z, ACT), F, INNER)

    # 3. Shrink grad_y, in fp32, and through the activation.
    acc = tl.zeros((BLOCK_T, INNER), tl.float32)
    for k in range(0, K, BLOCK):
        grad_y = load_block(grad_y_ptr, rows, row_ok, K, k, K, BLOCK)  # [BLOCK_T, BLOCK]
        up = load_block(up_ptr, inner, used, K, k, K, BLOCK)  # [INNER, BLOCK]
        acc = tl.dot(grad_y, tl.trans(up), acc, input_precision="ieee")
    z = load_block(z_ptr, rows, row_ok, F, 0, F, INNER).to(tl.float32)
    acc = scale * acc * act_slope(z, ACT)
    _store_block(grad_z_ptr, rows, row_ok, 0, acc, F, INNER)

    # 4. Expand.
    if grad_x_ptr is not None:
        grad_z = rounded(acc, grad_z_ptr.dtype.element_ty)
        for k in range(0, K, BLOCK):
            down = load_block(down_ptr, inner, used, K, k, K, BLOCK)
            grad_x = tl.dot(grad_z, down, input_precision="ieee")
            if SERIAL:
                grad_x += load_block(grad_y_ptr, rows, row_ok, K, k, K, BLOCK).to(tl.float32)
            _store_block(grad_x_ptr, rows, row_ok, k, grad_x, K, BLOCK)


# ---- What a bank hands over ----------------------------------------------------------------------------------------


class BottleneckTensors(NamedTuple):
    """What is trained at one site of a bank, for all its slots; or its gradients."""

    down: Tensor  # [U, F, K]
    down_bias: Tensor  # [U, F]
    up: Tensor  # [U, F, K], Wu transposed
    up_bias: Tensor  # [U, K]


@dataclass(frozen=True)
class Bottleneck:
    """One bank's bottlenecks at one site, for the rows of `segments`.

    weights, activation, scale, widths: as in `segment_bottleneck`.
    grads: where backward stores the gradients of slots that have rows: shapes of weights, fp32 (on a CPU any
           floating dtype).
           Other slots are left alone; what lies past a slot's own width is left alone or gets 0. None where no backward
           pass will come.
    """

    weights: BottleneckTensors
    grads: BottleneckTensors | None
    activation: str
    segments: Segments
    scale: Tensor | None = None
    widths: Tensor | None = None


# ---- On a GPU ------------------------------------------------------------------------------------------------------


def configuration(F: int, itemsize: int) -> dict[str, int]:
    """Rows of a tile and how to compile, for a width and bytes per number; never of the batch.

    Each program reads both matrices whole, so a wider bottleneck wants more rows per program, as many as registers hold
    z of. At full precision fp32 knows no matrix unit and a product takes more registers: smaller blocks.
    """
    if itemsize > 2:
        return {"BLOCK_T": 32 if F <= 32 else 16, "num_warps": 4 if F <= 32 else 8, "num_stages": 2}
    if F <= 32:
        return {"BLOCK_T": 32, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_T": 64, "num_warps": 4 if F <= 64 else 8, "num_stages": 3 if F <= 128 else 2}


def _forward_triton(g: Bottleneck, x: Tensor, residual: Tensor, y: Tensor) -> Tensor:
    """Write y; return z [T, F]. x, residual, y: [T, K], contiguous."""
    (_, F, K), plan = g.weights.down.shape, g.segments.plan
    config, z = configuration(F, x.itemsize), x.new_empty(len(x), F)
    tiles = plan.tiles[config["BLOCK_T"]]
    if len(tiles):
        _forward_kernel[(len(tiles),)](
            x, residual, y, z, *g.weights, tiles, plan.segments, g.scale, g.widths,
            *(tensor.stride(0) for tensor in g.weights), K, F, g.activation, **config,
        )  # fmt: skip
    return z


def _backward_triton(
    g: Bottleneck, x: Tensor, grad_y: Tensor, z: Tensor, serial: bool, grad_x: Tensor | None
) -> None:
    """Write grad_x, if it is wanted, and g.grads."""
    down, up, plan, (_, F, K) = g.weights.down, g.weights.up, g.segments.plan, g.weights.down.shape
    config = configuration(F, x.itemsize)
    tiles = plan.tiles[config["BLOCK_T"]]
    grad_z, scaled_h = torch.empty_like(z), torch.empty_like(z)
    ones = x.new_ones(1).as_strided((len(x), 1), (0, 1))  # [T, 1], one number in memory
    scale_rows = ones if g.scale is None else x.new_empty(len(x), 1)
    if len(tiles):
        _backward_kernel[(len(tiles),)](
            grad_y, z, grad_x, grad_z, scaled_h, scale_rows, down, up, tiles, plan.segments, g.scale, g.widths,
            down.stride(0), up.stride(0), K, F, g.activation, serial, **config,
        )  # fmt: skip
    wgrad(grad_z, x, plan, g.grads.down, g.widths)
    wgrad(ones, grad_z, plan, g.grads.down_bias[:, None, :])  # [U, 1, F]
    wgrad(scaled_h, grad_y, plan, g.grads.up, g.widths)
    wgrad(scale_rows, grad_y, plan, g.grads.up_bias[:, None, :])  # [U, 1, K]


# ---- On a CPU ------------------------------------------------------------------------------------------------------


def _of_pieces(g: Bottleneck, slots: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """down and up of every piece [n, F, K], and its scale [n, 1, 1] fp32."""
    down, up = (cpu.tile_matrices(matrices, slots, g.widths) for matrices in (g.weights.down, g.weights.up))
    return down, up, down.new_ones(1, 1, 1) if g.scale is None else take(g.scale, slots)[:, None, None]


def _forward_torch(g: Bottleneck, x: Tensor, residual: Tensor, y: Tensor) -> Tensor:
    """As _forward_triton, but z is of pieces, each [F, size], one after another in one dimension."""
    zs = [x.new_empty(0)]
    for pieces in g.segments.tiles.pieces:
        down, up, scale = _of_pieces(g, pieces.slots)
        down_bias = cpu.tile_matrices(g.weights.down_bias[:, :, None], pieces.slots, g.widths)  # [n, F, 1]
        z = torch.baddbmm(down_bias, down, pieces.of(x).transpose(1, 2))  # [n, F, size]
        cpu.expand_rows_(y, pieces, (scale * ACTIVATIONS[g.activation](z)).to(x.dtype), up, beta=0)
        zs.append(z.flatten())
    up_bias = g.weights.up_bias if g.scale is None else g.scale[:, None] * g.weights.up_bias
    y += up_bias.index_select(0, g.segments.slot_of_row)
    y += residual
    return torch.cat(zs)


def _backward_torch(
    g: Bottleneck, x: Tensor, grad_y: Tensor, z: Tensor, serial: bool, grad_x: Tensor | None
) -> None:
    """As _backward_triton."""
    tiles, wide = g.segments.tiles, torch.promote_types(x.dtype, torch.float32)  # bf16 would round every piece's sum
    partial, end = [], 0
    for pieces in tiles.pieces:
        down, up, scale = _of_pieces(g, pieces.slots)
        x_part, grad_y_part = pieces.of(x), pieces.of(grad_y)  # [n, size, K]
        (n, size, _), F = x_part.shape, down.shape[1]
        start, end = end, end + n * F * size
        with torch.enable_grad():
            z_part = z[start:end].view(n, F, size).detach().requires_grad_()
            h = ACTIVATIONS[g.activation](z_part)
            grad_h = (scale * torch.bmm(up, grad_y_part.transpose(1, 2))).to(h.dtype)
            (grad_z,) = torch.autograd.grad(h, z_part, grad_h)
        if grad_x is not None:
            cpu.expand_rows_(grad_x, pieces, grad_z, down, beta=0)
        ones = x.new_ones(n, size, 1)
        partial.append([torch.bmm(pieces.zero_filled_(v).to(wide), inputs.to(wide)) for v, inputs in (
            (grad_z, x_part), (grad_z, ones), (scale * h.detach(), grad_y_part),
            (scale * ones.transpose(1, 2), grad_y_part),
        )])  # fmt: skip
    if grad_x is not None and serial:
        grad_x += grad_y
    down, down_bias, up, up_bias = g.grads
    for grad, parts in zip((down, down_bias[:, :, None], up, up_bias[:, None, :]), zip(*partial)):
        cpu.store_(grad, cpu.sum_pieces(torch.cat(parts), tiles), tiles.groups.slots, None)


def path(device: torch.device):
    """(forward, backward) of the implementation that this device gets."""
    return (_forward_triton, _backward_triton) if backend(device) == "triton" else (_forward_torch, _backward_torch)


# ---- The op by itself ----------------------------------------------------------------------------------------------


class _SegmentBottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, down, down_bias, up, up_bias, segments, activation, scale, widths, forward_backward):
        forward, ctx.backward_ = forward_backward
        ctx.serial, ctx.segments, ctx.activation = residual is None, segments, activation
        y, weights = torch.empty_like(x), BottleneckTensors(down, down_bias, up, up_bias)
        g = Bottleneck(weights, None, activation, segments, scale, widths)
        z = forward(g, x, x if residual is None else residual, y)
        ctx.save_for_backward(x, z, scale, widths, *weights)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, z, scale, widths, *weights = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        grads = BottleneckTensors(*(torch.zeros(w.shape, dtype=wide, device=w.device) for w in weights))
        g = Bottleneck(BottleneckTensors(*weights), grads, ctx.activation, ctx.segments, scale, widths)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        ctx.backward_(g, x, grad_y.contiguous(), z, ctx.serial, grad_x)  # equations at the top of this file
        grad_residual = None if ctx.serial else grad_y
        return grad_x, grad_residual, *(grad.to(x.dtype) for grad in grads), None, None, None, None, None


def check(op: str, g: Bottleneck, x: Tensor, residual: Tensor | None) -> None:
    """x, residual: the rows that g's segments cover."""
    down = g.weights.down
    g.segments.check_rows(op, x)
    if down.ndim != 3 or down.shape[2] != x.shape[1]:
        raise ValueError(f"{op}: x has {x.shape[1]} columns but down is {tuple(down.shape)}, made for "
                         f"{down.shape[-1]}. Was this adapter trained on another base?")
    U, F, K = down.shape
    if not 1 <= F <= MAX_F:
        raise ValueError(f"{op}: a bottleneck of width {F}; supported are 1 to {MAX_F}.")
    needed, got = ((U, F), (U, F, K), (U, K)), tuple(tuple(tensor.shape) for tensor in g.weights[1:])
    if got != needed:
        raise ValueError(f"{op}: down is {(U, F, K)}, so down_bias, up (transposed) and up_bias must be {needed}; "
                         f"got {got}.")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"{op}: residual is {tuple(residual.shape)} {residual.dtype} but x is {tuple(x.shape)} "
                         f"{x.dtype}; they must agree, or residual be None for x itself.")
    check_dtype(op, x)
    if any(tensor.dtype != x.dtype for tensor in g.weights):
        raise ValueError(f"{op}: x and the weights must share a dtype; got {x.dtype} and "
                         f"{', '.join(str(tensor.dtype) for tensor in g.weights)}.")
    for name, tensor, grads in zip(BottleneckTensors._fields, g.weights, g.grads or [None] * len(g.weights)):
        check_slots(op, f"{name} of the weights", tensor, tensor.shape)
        if grads is not None:
            check_grads(op, f"{name} of the grads", grads, tensor.shape)
    for name, table, dtype in (("scale", g.scale, torch.float32), ("widths", g.widths, torch.int32)):
        if table is not None:
            check_table(op, f"{name} (one per slot)", table, (U,), dtype)
            check_no_grad(op, name, table)
    if g.activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {g.activation!r}; choose one of {', '.join(ACTIVATIONS)}.")
    g.segments.check_bank(op, U)


def segment_bottleneck(
    x: Tensor, residual: Tensor | None, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor,
    segments: Segments, activation: str, scale: Tensor | None = None, widths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y[t] = r[t] + scale[u] * (up[u]^T @ act(down[u] @ x[t] + down_bias[u]) + up_bias[u]), where slot u owns row t.

    Houlsby et al. 2019 (arXiv:1902.00751), section 2.1, for many users at once.

    Args:
        x:         [T, K] fp32, bf16 or fp16 (on a CPU also fp64). Packed rows, in segment order.
        residual:  [T, K], dtype of x: r. None: r is x itself (a serial adapter), cheaper than passing x twice.
        down, up:  [U, F, K], dtype of x, F from 1 to 256. up is Wu transposed. down_bias: [U, F]. up_bias: [U, K].
                   Views of the bank: contiguous within a slot, any stride between slots.
        activation: "relu", "gelu" (exact), "gelu_tanh" or "silu".
        scale:     [U] fp32, no unit; None: 1. Contiguous, as widths is. It gets no gradient.
        widths:    [U] int32, a slot's own F; None: all use F. Rows of down and up past it, and of down_bias, have no
                   effect, whatever they hold, and get gradient 0.
    Returns:
        [T, K], dtype of x; sums run in fp32. Differentiable in x, residual, down, down_bias, up and up_bias; a slot
        without rows gets gradient 0.
    Raises:
        ValueError: shapes, dtypes or layouts disagree, scale requires grad, or the device has no implementation.
    Cost: 4 * T * F * K FLOPs, twice that backward; keeps x and z, [T, F]. Same bits on every run.
    """
    weights = BottleneckTensors(down, down_bias, up, up_bias)
    check("segment_bottleneck", Bottleneck(weights, None, activation, segments, scale, widths), x, residual)
    residual = None if residual is None else residual.contiguous()
    return _SegmentBottleneck.apply(
        x.contiguous(), residual, *weights, segments, activation, scale, widths, path(x.device)
    )
