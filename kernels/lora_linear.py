"""Frozen linear maps of one input, and every row's own LoRA on them: what training calls.

    y_m[t] = W_m x[t] + b_m + s_u B_um A_um x[t]        m = 1 .. M, slot u owns row t

M is 1, or the number of sites that share their input (q|k|v, gate|up). The sums of segment_lora.py, at few more passes
over [T, N] than the frozen product makes by itself:

    on a GPU   the delta is written first and the product adds itself to it (cuBLAS with beta = 1): one more write and
               read of y; where the map has a bias, which cuBLAS then leaves to us, another of each
    on a CPU   the product is written first and the pieces' products are added in place

Backward goes the same way with grad_x, and writes weight gradients straight into the bank's gradient rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels import cpu
from minipeft_kernels.backend import backend
from minipeft_kernels.layouts import check_dtype
from minipeft_kernels.segment_lora import (
    Lora,
    backward_torch,
    backward_triton,
    check,
    forward_torch,
    forward_triton,
    num_kept,
)
from minipeft_kernels.segments import other_rows
from minipeft_kernels.shrink_expand import check_sites


@dataclass(frozen=True)
class LoraRows:
    """A bank's LoRA and the rows of the batch it acts on: first_row .. first_row + T_g - 1."""

    first_row: int
    lora: Lora

    def of(self, x: Tensor) -> Tensor:
        """Its rows of x [T, K]: a view [T_g, K]."""
        return x[self.first_row : self.first_row + self.lora.segments.num_rows]


class _TritonLinear(torch.autograd.Function):
    """`anchor` is any tensor that requires grad: it keeps backward alive at a site whose x needs no gradient."""

    @staticmethod
    def forward(ctx, x, anchor, groups, others, weights, biases, products):
        widths = [len(weight) for weight in weights]
        y = x.new_empty(len(x), sum(widths))
        for rows in others:
            y[rows] = 0.0
        kept = [forward_triton(g.lora, g.of(x), g.of(y)) for g in groups]
        ys = y.split(widths, dim=1)
        for y_m, weight, bias, product in zip(ys, weights, biases, products or [None] * len(ys)):
            if product is not None:
                y_m += product
                continue
            y_m.addmm_(x, weight.t())
            if bias is not None:
                y_m += bias
        ctx.save_for_backward(x, *(v for (v,) in kept))
        ctx.groups, ctx.others, ctx.weights = groups, others, weights
        return ys

    @staticmethod
    def backward(ctx, *grad_ys):
        x, *kept = ctx.saved_tensors
        grad_ys = [grad_y.contiguous() for grad_y in grad_ys]
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for g, v in zip(ctx.groups, kept):
            backward_triton(g.lora, g.of(x), [g.of(grad_y) for grad_y in grad_ys], (v,),
                            None if grad_x is None else g.of(grad_x))  # fmt: skip
        if grad_x is not None:
            for rows in ctx.others:
                grad_x[rows] = 0.0
            for grad_y, weight in zip(grad_ys, ctx.weights):
                grad_x.addmm_(grad_y, weight)
        return grad_x, *(None,) * 6


class _TorchLinear(torch.autograd.Function):
    """As _TritonLinear, on a CPU. tile: None, or the tile of the frozen products (see lora_linear)."""

    @staticmethod
    def forward(ctx, x, anchor, groups, weights, biases, tile, products):
        if products is not None:
            ys = list(products)
        elif tile is None:
            ys = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
        else:
            ys = [cpu.tiled_linear(x, weight, bias, tile) for weight, bias in zip(weights, biases)]
        kept = [forward_torch(g.lora, g.of(x), [g.of(y) for y in ys], beta=1) for g in groups]
        ctx.save_for_backward(*(tensor for of_group in kept for tensor in of_group))
        ctx.groups, ctx.weights, ctx.tile = groups, weights, tile
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grad_ys):
        kept = list(ctx.saved_tensors)
        grad_ys = [grad_y.contiguous() for grad_y in grad_ys]
        grad_x = None
        if ctx.needs_input_grad[0]:
            for grad_y, weight in zip(grad_ys, ctx.weights):
                if ctx.tile is not None:
                    product = cpu.tiled_linear(grad_y, weight.t(), None, ctx.tile)
                    grad_x = product if grad_x is None else grad_x.add_(product)
                else:
                    grad_x = grad_y @ weight if grad_x is None else grad_x.addmm_(grad_y, weight)
        for g in ctx.groups:
            own, kept = kept[: num_kept(g.lora)], kept[num_kept(g.lora) :]
            backward_torch(g.lora, [g.of(grad_y) for grad_y in grad_ys], own,
                           None if grad_x is None else g.of(grad_x), beta=1)  # fmt: skip
        return grad_x, *(None,) * 6


def _check_frozen(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], tile: int | None) -> None:
    if x.ndim != 2 or not weights or len(biases) != len(weights):
        raise ValueError(f"lora_linear: x is {tuple(x.shape)}, with {len(weights)} weights and {len(biases)} biases; "
                         "give rows [T, K], a weight or several, and a bias or None for each.")
    check_dtype("lora_linear", x)
    for weight, bias in zip(weights, biases):
        if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(f"lora_linear: x has {x.shape[1]} columns but a weight is {tuple(weight.shape)}; needed "
                             f"is [N, {x.shape[1]}].")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"lora_linear: a weight is {tuple(weight.shape)} but its bias {tuple(bias.shape)}; needed "
                             f"is ({len(weight)},).")
        if any((frozen.dtype, frozen.device) != (x.dtype, x.device) for frozen in (weight, bias) if frozen is not None):
            raise ValueError(f"lora_linear: x is {x.dtype} on {x.device} but a weight {weight.dtype} on {weight.device}"
                             f"{'' if bias is None else f', its bias {bias.dtype} on {bias.device}'}; convert one.")
    if tile is not None and (tile < 1 or len(x) % tile):
        raise ValueError(f"lora_linear: x has {len(x)} rows, no multiple of tile {tile}; fill them up, or pass "
                         "tile=None.")


def lora_linear(
    x: Tensor, anchor: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    groups: Sequence[LoraRows], tile: int | None = None, products: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y_m[t] = W_m x[t] + b_m + scale[u] * B_m[u] @ A_m[u] @ x[t]: frozen linear maps and every row's own LoRA on them.

    Args:
        x:       [T, K] fp32, bf16 or fp16 (on a CPU also fp64), copied unless contiguous.
                 anchor: any tensor that requires grad, unused (see _TritonLinear).
        weights: M of [N_m, K], frozen. biases: M of [N_m] or None, frozen. Both of dtype and device of x.
        groups:  the banks that act here, at all M sites, each on its own rows. Gradients are written where they say.
        tile:    None: one matrix product for all rows. A number: fixed tiles of that many rows (T a multiple of it), so
                 that a row's bits do not depend on the company (at ranks from 8 on, which banks pad to); costs a few
                 percent. Not on a GPU yet.
        products: the frozen products W_m x + b_m, M of [T, N_m], where the caller has them; they are overwritten.
    Returns:
        M of [T, N_m], dtype of x. Differentiable in x.
    Raises:
        ValueError: shapes, dtypes, layouts or devices disagree; T is no multiple of tile; or groups share rows or lie
            outside of x.
    """
    for g in groups:
        R = g.lora.Bts[0].shape[1]
        if len(g.lora.Bts) != len(weights) or g.lora.A.shape[1] != len(weights) * R:
            raise ValueError(f"lora_linear: {len(weights)} frozen maps, but a LoRA has {len(g.lora.Bts)} Bts and "
                             f"{g.lora.A.shape[1]} rank rows in A; give it as many sites.")
        check("lora_linear", g.of(x), g.lora)
        if len(g.lora.grad_Bts) != len(weights):
            raise ValueError(f"lora_linear: {len(weights)} Bts but {len(g.lora.grad_Bts)} grad_Bts; give one for each.")
        if [Bt.shape[2] for Bt in g.lora.Bts] != [len(weight) for weight in weights]:
            raise ValueError(f"lora_linear: the frozen maps have {[len(weight) for weight in weights]} outputs, but a "
                             f"LoRA's Bts have {[Bt.shape[2] for Bt in g.lora.Bts]} columns. Was this adapter trained "
                             "on another base?")
        if g.lora.segments.plan is not None:
            check_sites("lora_linear", g.lora.sites, g.lora.Bts)
    _check_frozen(x, weights, biases, tile)
    shapes = [(len(x), len(weight)) for weight in weights]
    if products is not None and [tuple(y.shape) for y in products] != shapes:
        raise ValueError(f"lora_linear: products are {[tuple(y.shape) for y in products]}, those of these weights are "
                         f"{shapes}.")
    others = other_rows("lora_linear", ((g.first_row, g.lora.segments) for g in groups), len(x))
    if backend(x.device) == "torch":
        return _TorchLinear.apply(x.contiguous(), anchor, groups, weights, biases, tile, products)
    if tile is not None:
        raise ValueError("lora_linear: products in fixed tiles (deterministic mode) are not built for a GPU; "
                         "use tile=None there.")
    return _TritonLinear.apply(x.contiguous(), anchor, groups, others, weights, biases, products)
