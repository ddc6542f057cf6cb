"""The ops of the kernel benchmark: ours, the definition, what people run today, and what no version can do without.

VARIANTS are ops with options that a benchmark does not time and the GPU checks do not leave out.

Bytes count each input once and each output once, whatever an implementation reads again; e is the bytes of a number of
x, S the users with rows, U the resident slots. A gradient that an op returns is written for all slots, as it promises.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.kernel_cases import Inputs, Op, Outputs, Point, Way
from minipeft_kernels import baselines, reference
from minipeft_kernels.adamw import SQUARES_BLOCK, AdamWSettings, adamw_
from minipeft_kernels.backend import backend
from minipeft_kernels.baselines import DoesNotApply
from minipeft_kernels.bgmv import bgmv
from minipeft_kernels.bottleneck import segment_bottleneck
from minipeft_kernels.dropout import keep_mask
from minipeft_kernels.ia3 import segment_ia3
from minipeft_kernels.lora_linear import LoraRows, lora_linear
from minipeft_kernels.prompts import PromptPlan, gather_prompts
from minipeft_kernels.segment_lora import Lora, segment_lora
from minipeft_kernels.segment_matmul import segment_matmul
from minipeft_kernels.shift import segment_shift
from minipeft_kernels.shrink_expand import shrink_expand, site_table
from minipeft_kernels.wgrad import num_squares, wgrad

SEQUENCE = 64  # rows of a sequence that has a prompt
SITES_OF_A_ROW = 2  # of the LoRA whose row AdamW steps
ACTIVATION = "gelu"


def through_autograd(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Way:
    """The way that runs function(inputs, x, *weights), and backward by autograd."""

    def way(inputs: Inputs, backward: bool) -> Outputs:
        if not backward:
            with torch.no_grad():
                return Outputs(_several(function(inputs, inputs.x, *inputs.weights)), [])
        leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, *inputs.weights)]
        ys = _several(function(inputs, *leaves))
        grad_x, *grads = torch.autograd.grad(ys, leaves, inputs.grad_ys)
        return Outputs([*(y.detach() for y in ys), grad_x], grads)

    return way


def _several(ys: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [ys] if isinstance(ys, Tensor) else list(ys)


def no_way(reason: str) -> Way:
    """In place of a baseline that does not exist: null in results, and why."""

    def way(inputs: Inputs, backward: bool) -> Outputs:
        raise DoesNotApply(reason)

    return way


def _sizes(i: Inputs) -> tuple[int, int, int, int, int, int, int]:
    """e, T, K, N, R, S, U."""
    return i.x.itemsize, *i.x.shape, sum(i.point.widths), i.point.rank, len(i.groups.lengths), len(i.bank)


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def _lora_spans(point: Point):
    """M of A [R, K], then M of Bt [R, N_m]."""
    As = [((point.rank, point.K), point.K**-0.5)] * len(point.widths)
    return As + [((point.rank, N), 1.0) for N in point.widths]


def _with_groups(baseline) -> Callable[..., Tensor]:
    return lambda i, x, A, Bt: baseline(x, A, Bt, i.scale, i.groups, i.ranks)


LORA = {
    "loop": lambda i, x, A, Bt: reference.segment_lora(x, A, Bt, i.scale, i.segments, i.ranks),
    "gather_bmm": _with_groups(baselines.gather_bmm),
    "padded_bmm": _with_groups(baselines.padded_bmm),
    "grouped_mm": _with_groups(baselines.grouped_mm),
}


def _segment_lora(i: Inputs, x: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
    return segment_lora(x, A, Bt, i.scale, i.segments, i.ranks)


def _segment_lora_cost(i: Inputs, backward: bool) -> tuple[int, int]:
    e, T, K, N, R, S, U = _sizes(i)
    num_bytes = e * (T * (K + N) + S * R * (K + N) + T * R)  # x, y; A, Bt; v
    if backward:  # grad_y, x, grad_x; v; A, Bt; their gradients
        num_bytes += e * (T * (N + 2 * K) + T * R + S * R * (K + N) + U * R * (K + N))
    return num_bytes, 2 * T * R * (K + N) * (3 if backward else 1)


SEGMENT_LORA = Op(
    define=through_autograd(LORA["loop"]),
    ways={name: through_autograd(way) for name, way in ({"ours": _segment_lora} | LORA).items()},
    cost=_segment_lora_cost, spans=_lora_spans, passes=(False, True), ranked=True,
)  # fmt: skip


def _prepare_dropout(i: Inputs) -> Inputs:
    """drop [S, 2] of dropout.py: each slot has its own key, and 0, 1/4 or 1/2 of its numbers are dropped (p)."""
    slots = torch.from_numpy(i.segments.slots).to(i.x.device)
    return replace(i, prepared=torch.stack([(slots + 1) * 0x1E3779B97F4A7C15, slots % 3 * 64], 1))


def _segment_lora_dropout(i: Inputs, x: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
    return segment_lora(x, A, Bt, i.scale, i.segments, i.ranks, drop=i.prepared)


def _define_dropout(i: Inputs, x: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
    """The same mask, drawn by PyTorch; 1 / (1 - p) multiplies the user's scale."""
    keep, _ = keep_mask(i.prepared, i.segments.starts, x.shape[1])
    scale = i.scale.double() * 4 / (4 - torch.arange(len(i.scale), device=x.device) % 3)
    return reference.segment_lora(torch.where(keep, x, 0.0), A, Bt, scale, i.segments, i.ranks)


SEGMENT_LORA_DROPOUT = replace(
    SEGMENT_LORA, define=through_autograd(_define_dropout), ways={"ours": through_autograd(_segment_lora_dropout)},
    prepare=_prepare_dropout,
)  # fmt: skip


# ---- LoRA beside its frozen product --------------------------------------------------------------------------------


def _matrices(i: Inputs, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of a bank's rows [U, P]: A of all sites [U, M * R, K], and M of [U, R, N_m]."""
    M, K, R = len(i.point.widths), i.point.K, i.point.rank
    A, *Bts = rows[:, : R * (M * K + sum(i.point.widths))].split([M * R * K, *(R * N for N in i.point.widths)], 1)
    return A.unflatten(1, (M * R, K)), tuple(Bt.unflatten(1, (R, -1)) for Bt in Bts)


def _prepare_lora_linear(i: Inputs) -> Inputs:
    """Frozen weights; the bank's `Lora`, whose gradients go into another bank."""
    device, M, K, R = i.x.device, len(i.point.widths), i.point.K, i.point.rank
    kernels = backend(device) == "triton"
    draw = torch.Generator(device).manual_seed(0)
    frozen = tuple((torch.randn(N, K, generator=draw, device=device) * K**-0.5).to(i.x.dtype) for N in i.point.widths)
    grads = torch.empty(i.bank.shape, dtype=torch.float32 if kernels else i.x.dtype, device=device)
    (A, Bts), (grad_A, grad_Bts) = _matrices(i, i.bank), _matrices(i, grads)
    sites = site_table(i.point.widths, M * R, i.x.dtype, device) if kernels else None
    lora = Lora(A, Bts, i.scale, i.ranks, i.segments, grad_A, grad_Bts, sites)
    return replace(i, frozen=frozen, buffers=(grads,), prepared=LoraRows(0, lora))


def _lora_linear(i: Inputs, backward: bool) -> Outputs:
    x = i.x.detach().requires_grad_(backward)
    ys = lora_linear(x, i.scale, i.frozen, [None] * len(i.frozen), [i.prepared])
    if not backward:
        return Outputs(list(ys), [])
    (grad_x,) = torch.autograd.grad(ys, x, i.grad_ys)
    lora = i.prepared.lora
    return Outputs([*(y.detach() for y in ys), grad_x], [*lora.grad_A.split(i.point.rank, 1), *lora.grad_Bts])


def _frozen(i: Inputs, backward: bool) -> Outputs:
    """The base alone."""
    x = i.x.detach().requires_grad_(backward)
    ys = [F.linear(x, weight) for weight in i.frozen]
    return Outputs([*ys, *torch.autograd.grad(ys, x, i.grad_ys)] if backward else ys, [])


def _beside_frozen(way: Callable[..., Tensor]) -> Way:
    def function(i: Inputs, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        M = len(i.frozen)
        return tuple(F.linear(x, W) + way(i, x, A, Bt) for W, A, Bt in zip(i.frozen, weights[:M], weights[M:]))

    return through_autograd(function)


def _lora_linear_cost(i: Inputs, backward: bool) -> tuple[int, int]:
    e, T, K, N, R, S, _ = _sizes(i)
    M = len(i.point.widths)
    row = R * (M * K + N)  # numbers of a user
    num_bytes, flops = e * (T * (K + N) + K * N + S * row + T * M * R), 2 * T * (K * N + row)
    if backward:  # as above; W once more; gradients go to the slots that have rows
        num_bytes += e * (T * (N + 2 * K) + K * N + T * M * R + S * row) + i.buffers[0].itemsize * S * row
        flops += 2 * T * (K * N + 2 * row)
    return num_bytes, flops


LORA_LINEAR = Op(
    define=_beside_frozen(LORA["loop"]),
    ways={"ours": _lora_linear, "frozen": _frozen} | {name: _beside_frozen(way) for name, way in LORA.items()},
    cost=_lora_linear_cost, spans=_lora_spans, prepare=_prepare_lora_linear, filled=True,
)  # fmt: skip


# ---- The launchers behind them -------------------------------------------------------------------------------------


def _shrink_expand(i: Inputs, backward: bool) -> Outputs:
    (y,) = i.buffers
    v = shrink_expand(i.x, *i.weights, y, i.scale, i.ranks, i.segments.plan)
    return Outputs([y, v], [])


def _define_shrink_expand(i: Inputs, backward: bool) -> Outputs:
    (A, Bt), R = i.weights, i.point.rank
    same = torch.eye(R, dtype=i.x.dtype, device=i.x.device).expand(len(A), R, R)
    return Outputs([LORA["loop"](i, i.x, A, Bt_) for Bt_ in (Bt, same)], [])


SHRINK_EXPAND = Op(  # baselines compute v as well, each in a layout of its own, and hand out y
    define=_define_shrink_expand, cost=_segment_lora_cost, spans=_lora_spans,
    ways={"ours": _shrink_expand} | {name: through_autograd(way) for name, way in LORA.items()},
    prepare=lambda i: replace(i, buffers=(i.x.new_empty(len(i.x), *i.point.widths),)), passes=(False,), ranked=True,
    launcher=True,
)  # fmt: skip


def _wgrad(i: Inputs, backward: bool) -> Outputs:
    wgrad(*i.grad_ys, i.x, i.segments.plan, *i.buffers, i.ranks)
    return Outputs([], list(i.buffers))


def _wgrad_baseline(function) -> Way:
    def way(i: Inputs, backward: bool) -> Outputs:
        grad = i.x.new_empty(i.buffers[0].shape)
        function(*i.grad_ys, i.x, grad, i.groups)
        return Outputs([], [grad])

    return way


def _define_wgrad(i: Inputs, backward: bool) -> Outputs:
    """The gradient of A in v = A x."""
    (A,), (grad_v,), R = i.weights, i.grad_ys, i.point.rank
    A, same = torch.zeros_like(A).requires_grad_(), torch.eye(R, dtype=i.x.dtype, device=i.x.device)
    v = reference.segment_lora(i.x, A, same.expand(len(A), R, R), torch.ones_like(i.scale), i.segments)
    return Outputs([], list(torch.autograd.grad(v, A, grad_v)))


def _wgrad_cost(i: Inputs, backward: bool) -> tuple[int, int]:
    e, T, K, _, R, S, _ = _sizes(i)
    return e * T * (K + R) + 4 * S * R * K, 2 * T * R * K


def _prepare_wgrad(i: Inputs) -> Inputs:
    grad_v = i.grad_ys[0][:, : i.point.rank].contiguous()
    grad = torch.empty(len(i.bank), i.point.rank, i.point.K, dtype=torch.float32, device=i.x.device)
    return replace(i, grad_ys=(grad_v,), buffers=(grad,))


WGRAD = Op(
    define=_define_wgrad, cost=_wgrad_cost,
    ways={"ours": _wgrad, "loop": _wgrad_baseline(baselines.loop_wgrad),
          "gather_bmm": no_way("gather_bmm: not measured, a matrix per row, added up afterwards"),
          "padded_bmm": _wgrad_baseline(baselines.padded_wgrad),
          "grouped_mm": _wgrad_baseline(baselines.grouped_wgrad)},
    spans=lambda point: [((point.rank, point.K), point.K**-0.5)], prepare=_prepare_wgrad, launcher=True,
    accurate=("ours",),
)  # fmt: skip


def _prepare_wgrad_later(i: Inputs) -> Inputs:
    """Slots of odd numbers accumulate; sums of squares have a place."""
    i = _prepare_wgrad(i)
    U, R, K = i.buffers[0].shape
    later = torch.arange(U, dtype=torch.int32, device=i.x.device) % 2
    squares = torch.empty(U, num_squares(R, K, i.x.itemsize), dtype=torch.float32, device=i.x.device)
    return replace(i, buffers=(*i.buffers, squares), prepared=later)


def _wgrad_later(i: Inputs, backward: bool) -> Outputs:
    """What a gradient held before is the user's weights, for want of anything better; slots that store held NaN."""
    (before,), (grad, squares), later = i.weights, i.buffers, i.prepared
    grad.copy_(torch.where(later.bool()[:, None, None], before, torch.nan))
    wgrad(*i.grad_ys, i.x, i.segments.plan, grad, i.ranks, later, squares)
    return Outputs([], [grad, squares.sum(1)])


def _define_wgrad_later(i: Inputs, backward: bool) -> Outputs:
    (before,), (grad,) = i.weights, _define_wgrad(i, backward).slots
    grad = torch.where(i.prepared.bool()[:, None, None], before + grad, grad)
    return Outputs([], [grad, grad.square().sum((1, 2))])


WGRAD_LATER = replace(WGRAD, define=_define_wgrad_later, ways={"ours": _wgrad_later}, prepare=_prepare_wgrad_later)


def _bgmv(i: Inputs, backward: bool) -> Outputs:
    return Outputs([bgmv(i.x, *i.weights, i.scale, i.groups.slot_of_row, i.ranks)], [])


def _bgmv_by_row(i: Inputs, backward: bool) -> Outputs:
    return Outputs([reference.bgmv(i.x, *i.weights, i.scale, i.groups.slot_of_row, i.ranks)], [])


def _bgmv_cost(i: Inputs, backward: bool) -> tuple[int, int]:
    e, T, K, N, R, S, _ = _sizes(i)
    return e * (T * (K + N) + S * R * (K + N)), 2 * T * R * (K + N)


BGMV = Op(
    define=_bgmv_by_row, cost=_bgmv_cost, spans=_lora_spans, passes=(False,), ranked=True,
    ways={"ours": _bgmv} | {name: through_autograd(way) for name, way in LORA.items()} | {"loop": _bgmv_by_row},
)  # fmt: skip


# ---- The other methods ---------------------------------------------------------------------------------------------


def _bottleneck(op) -> Way:
    return through_autograd(lambda i, x, *weights: op(x, None, *weights, i.segments, ACTIVATION, i.scale, i.ranks))


def _bottleneck_spans(point: Point):
    F_, K = point.rank, point.K
    return [((F_, K), K**-0.5), ((F_,), 0.1), ((F_, K), F_**-0.5), ((K,), 0.1)]


def _bottleneck_cost(i: Inputs, backward: bool) -> tuple[int, int]:
    e, T, K, _, F_, S, U = _sizes(i)
    row = 2 * F_ * K + F_ + K
    num_bytes = e * (T * (2 * K + F_) + S * row)  # x, y; z
    if backward:  # grad_y, x, grad_x; z
        num_bytes += e * (T * (3 * K + F_) + S * 2 * F_ * K + U * row)
    return num_bytes, 4 * T * F_ * K * (3 if backward else 1)


def _bottleneck_baseline(function) -> Way:
    return through_autograd(lambda i, x, *weights: function(x, *weights, i.scale, F.gelu, i.groups, i.ranks))


BOTTLENECK = Op(
    define=_bottleneck(reference.segment_bottleneck),
    ways={"ours": _bottleneck(segment_bottleneck), "loop": _bottleneck(reference.segment_bottleneck),
          "gather_bmm": no_way("gather_bmm: not measured, both matrices for every row"),
          "padded_bmm": _bottleneck_baseline(baselines.padded_bottleneck),
          "grouped_mm": _bottleneck_baseline(baselines.grouped_bottleneck)},
    cost=_bottleneck_cost, spans=_bottleneck_spans, size="F", ranked=True,
)  # fmt: skip


def _ia3_cost(i: Inputs, backward: bool) -> tuple[int, int]:
    e, T, K, _, _, S, U = _sizes(i)
    if not backward:
        return e * (2 * T * K + S * K), T * K
    return e * (5 * T * K + 2 * S * K + U * K), 4 * T * K  # x, y; grad_y, x, grad_x


def _on_segments(op) -> Way:
    return through_autograd(lambda i, x, vectors: op(x, vectors, i.segments))


IA3 = Op(
    define=_on_segments(reference.segment_ia3),
    ways={"ours": _on_segments(segment_ia3), "loop": _on_segments(reference.segment_ia3),
          "gather": through_autograd(lambda i, x, vectors: baselines.gather_ia3(x, vectors, i.groups))},
    cost=_ia3_cost, spans=lambda point: [((point.K,), 1.0)], size=None,
)  # fmt: skip


def _shift_cost(i: Inputs, backward: bool) -> tuple[int, int]:
    e, T, K, _, _, S, U = _sizes(i)
    if not backward:
        return e * (2 * T * K + S * K), T * K
    return e * (3 * T * K + S * K + U * K), 2 * T * K  # x, y; grad_y, which is grad_x


SHIFT = Op(
    define=_on_segments(reference.segment_shift),
    ways={"ours": _on_segments(segment_shift), "loop": _on_segments(reference.segment_shift),
          "gather": through_autograd(lambda i, x, vectors: baselines.gather_shift(x, vectors, i.groups))},
    cost=_shift_cost, spans=lambda point: [((point.K,), 1.0)], size=None,
)  # fmt: skip


def _whole(rank: int) -> int:
    """A rank as banks hold it where grouped_mm multiplies: padded to whole 16 bytes in every dtype."""
    return -(-rank // 8) * 8


def _prepare_matmul(i: Inputs) -> Inputs:
    """R -> N, as LoRA's second product at the token embedding. Gradients go into another bank."""
    (W,) = i.weights
    dtype = torch.float32 if backend(W.device) == "triton" else W.dtype
    return replace(i, x=i.x[:, : W.shape[1]].contiguous(),
                   buffers=(torch.empty(W.shape, dtype=dtype, device=W.device),))  # fmt: skip


def _matmul(i: Inputs, backward: bool) -> Outputs:
    x, (W,), (grad_W,) = i.x.detach().requires_grad_(), i.weights, i.buffers
    y = segment_matmul(x, i.scale, W, grad_W, i.segments)
    (grad_x,) = torch.autograd.grad(y, x, i.grad_ys)
    return Outputs([y.detach(), grad_x], [grad_W])


def _matmul_cost(i: Inputs, backward: bool) -> tuple[int, int]:
    e, T, R, N, _, S, _ = _sizes(i)
    num_bytes = e * (2 * T * (R + N) + S * R * N)  # x, W, y; grad_y, grad_x
    num_bytes += e * (T * R + S * R * N) + i.buffers[0].itemsize * S * R * N  # x and W once more, for backward; grad_W
    return num_bytes, 6 * T * R * N


def _matmul_baseline(function) -> Way:
    return through_autograd(lambda i, x, W: function(x, W, i.groups))


SEGMENT_MATMUL = Op(
    define=_on_segments(reference.segment_matmul),
    ways={"ours": _matmul, "loop": _on_segments(reference.segment_matmul),
          "gather_bmm": _matmul_baseline(baselines.gather_matmul),
          "padded_bmm": _matmul_baseline(baselines.padded_matmul),
          "grouped_mm": _matmul_baseline(baselines.grouped_matmul)},
    cost=_matmul_cost, prepare=_prepare_matmul,
    spans=lambda point: [((_whole(point.rank), point.widths[0]), point.rank**-0.5)],
)  # fmt: skip


def _prepare_prompts(i: Inputs) -> Inputs:
    """Every user's rows are sequences of SEQUENCE rows, the last one longer; each begins with the user's prompt."""
    slots, first_rows, counts = [], [], []
    for slot, start, length in zip(i.groups.slots.tolist(), np.cumsum([0, *i.groups.lengths]), i.groups.lengths):
        num_sequences = max(1, length // SEQUENCE)
        slots += [slot] * num_sequences
        first_rows += [start + SEQUENCE * n for n in range(num_sequences)]
        counts += [min(i.point.rank, length)] * num_sequences
    return replace(i, prepared=PromptPlan.build(slots, first_rows, counts, i.x.device))


def _prompts_cost(i: Inputs, backward: bool) -> tuple[int, int]:
    e, T, K, _, V, _, U = _sizes(i)
    num_tokens, num_places = len(i.prepared.tokens), len(i.prepared.rows)
    num_bytes, flops = e * K * (2 * T - num_places + num_tokens), 0  # x but where a prompt stands; y; prompts
    if backward:  # grad_y, grad_x
        num_bytes, flops = num_bytes + e * K * (2 * T + U * V), num_places * K
    return num_bytes, flops


def _on_plan(op) -> Way:
    return through_autograd(lambda i, x, prompts: op(x, prompts, i.prepared))


PROMPTS = Op(
    define=_on_plan(reference.gather_prompts),
    ways={"ours": _on_plan(gather_prompts), "loop": _on_plan(reference.gather_prompts),
          "gather": _on_plan(baselines.gather_prompts)},
    cost=_prompts_cost, spans=lambda point: [((point.rank, point.K), 1.0)], prepare=_prepare_prompts, size="V",
)  # fmt: skip


# ---- The optimizer -------------------------------------------------------------------------------------------------


def _prepare_adamw(i: Inputs) -> Inputs:
    """Four contiguous buffers in fp32; settings; on a GPU also what training passes besides; an optimizer per user."""
    weights, grads, exp_avg, exp_avg_sq = (tensor.float().contiguous() for tensor in i.weights)
    exp_avg_sq = exp_avg_sq.abs()
    slots, P = i.groups.slots, weights.shape[1]
    column = lambda value: torch.full((len(slots),), value, dtype=torch.float64)  # noqa: E731
    settings = AdamWSettings(lr=column(1e-3), weight_decay=column(0.01), beta1=column(0.9), beta2=column(0.999),
                             eps=column(1e-8), max_norm=column(1e9), step=column(1.0))  # fmt: skip
    squares, buffers = None, ()
    if backend(weights.device) == "triton":
        blocks = F.pad(grads.square(), (0, -P % SQUARES_BLOCK)).unflatten(1, (-1, SQUARES_BLOCK))
        squares, buffers = blocks.sum(-1), (grads.new_empty(len(grads), P, dtype=torch.bfloat16),)
    optimizers = []
    for slot in slots.tolist():
        parameter = weights[slot]
        parameter.grad = grads[slot]
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.01, fused=True)
        optimizer.state[parameter] = {"step": torch.zeros((), device=weights.device), "exp_avg": exp_avg[slot],
                                      "exp_avg_sq": exp_avg_sq[slot]}  # fmt: skip
        optimizers.append((parameter, optimizer))
    return replace(i, weights=(weights, grads, exp_avg, exp_avg_sq), buffers=buffers,
                   prepared=(settings, squares, optimizers))  # fmt: skip


def _stepped(i: Inputs) -> Outputs:
    weights, _, exp_avg, exp_avg_sq = i.weights
    return Outputs([], [weights, exp_avg, exp_avg_sq])


def _adamw(i: Inputs, backward: bool) -> Outputs:
    settings, squares, _ = i.prepared
    adamw_(*i.weights, i.groups.slots, settings, squares, *i.buffers)
    return _stepped(i)


def _define_adamw(i: Inputs, backward: bool) -> Outputs:
    reference.adamw_(*i.weights, i.groups.slots, i.prepared[0].as_dict())
    return _stepped(i)


def _adamw_by_user(i: Inputs, backward: bool) -> Outputs:
    """torch.optim.AdamW, one per user."""
    for parameter, optimizer in i.prepared[2]:
        torch.nn.utils.clip_grad_norm_([parameter], 1e9)
        optimizer.step()
    return _stepped(i)


def _adamw_cost(i: Inputs, backward: bool) -> tuple[int, int]:
    numbers = len(i.groups.slots) * i.weights[0].shape[1]
    return numbers * (28 + sum(buffer.itemsize for buffer in i.buffers)), 15 * numbers


ADAMW = Op(
    define=_define_adamw, ways={"ours": _adamw, "loop": _adamw_by_user}, cost=_adamw_cost,
    spans=lambda point: [((SITES_OF_A_ROW * point.rank * (point.K + sum(point.widths)) // 64 * 64,), 1.0)] * 4,
    prepare=_prepare_adamw, passes=(False,), size=None, in_place=True, accurate=("ours", "loop"),
)  # fmt: skip


OPS = {
    "segment_lora": SEGMENT_LORA, "lora_linear": LORA_LINEAR, "shrink_expand": SHRINK_EXPAND, "wgrad": WGRAD,
    "adamw": ADAMW, "bgmv": BGMV, "bottleneck": BOTTLENECK, "ia3": IA3, "shift": SHIFT,
    "segment_matmul": SEGMENT_MATMUL, "prompts": PROMPTS,
}  # fmt: skip
VARIANTS = {"segment_lora, dropout": SEGMENT_LORA_DROPOUT, "wgrad, accumulate and squares": WGRAD_LATER}
