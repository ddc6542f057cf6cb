"""What the kernel benchmark and the GPU checks measure: a batch of inputs, and an op with every way to compute it.

    op = OPS["segment_lora"]                                              # kernel_ops.py
    inputs = make(op, Point("llama-3.1-8b", 4096, (4096,), rank=16, T=16384, users=64), "cuda", torch.bfloat16)
    op.ways["ours"](inputs, True)          "ours", "loop", "gather_bmm", ...; True: backward as well
    relative_error(run(op, "ours", inputs, True), exactly(op, inputs, True), inputs)
    op.cost(inputs, True)                  bytes and FLOPs that no version can do without
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minipeft_kernels.baselines import Groups
from minipeft_kernels.segments import TILE, Segments

DISTRIBUTIONS = ("identical", "distinct", "uniform", "zipf", "giant_tiny", "absent")
ABSENT = 16  # resident slots per active user in "absent"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # |out - exact| / |exact|, by x's dtype


@dataclass(frozen=True)
class Point:
    """One batch to measure: T rows of `users` users at sites K -> widths of a model.

    rank: R of a LoRA, F of a bottleneck, V of a prompt. distribution: how rows are shared out, see `lengths_of`.
    """

    model: str
    K: int
    widths: tuple[int, ...]
    rank: int
    T: int
    users: int
    distribution: str = "uniform"


def lengths_of(point: Point, seed: int) -> tuple[list[int], int]:
    """Rows of each active user, T in all, and how many slots are resident. A function of the point and the seed.

    identical: one user has all rows. distinct: one sequence each, half to one and a half times the mean. uniform: the
    same for all, to a row. zipf: the k-th user has a share of 1/k. giant_tiny: one row each, and one user the rest.
    absent: as uniform, with ABSENT times as many slots resident as have rows.
    """
    rng, T, users = np.random.default_rng(seed), point.T, point.users
    if point.distribution == "identical":
        return [T], 1
    shares = {
        "distinct": rng.uniform(0.5, 1.5, users),
        "zipf": 1 / np.arange(1, users + 1),
        "giant_tiny": np.eye(1, users)[0],
    }.get(point.distribution, np.ones(users))
    ends = np.rint(np.cumsum(shares) / shares.sum() * (T - users)).astype(int)  # everybody has a row besides
    lengths = rng.permutation(1 + np.diff(ends, prepend=0))
    return lengths.tolist(), users * (ABSENT if point.distribution == "absent" else 1)


# ---- Inputs and outputs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """A batch of one op. Weights of slots without rows, and rank rows past a slot's own, are NaN: nobody may read them.

    x:        [T, K]. grad_ys: M of [T, N_m]. frozen: M of [N_m, K].
    weights:  what users train, each [U, ...], views of bank [U, P].
    scale:    [U] fp32. ranks: [U] int32, or None: all R.
    buffers:  where an op shall write. prepared: what it wants built beforehand, as a training step would.
    """

    point: Point
    x: Tensor
    grad_ys: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    bank: Tensor
    scale: Tensor
    ranks: Tensor | None
    segments: Segments
    groups: Groups
    frozen: tuple[Tensor, ...] = ()
    buffers: tuple[Tensor, ...] = ()
    prepared: object = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same batch in another dtype, or of copies."""
        each = lambda tensors: tuple(map(function, tensors))  # noqa: E731
        return replace(self, x=function(self.x), grad_ys=each(self.grad_ys), weights=each(self.weights),
                       frozen=each(self.frozen))  # fmt: skip


class Outputs(NamedTuple):
    rows: list[Tensor]  # [T, ...] each
    slots: list[Tensor]  # [U, ...] each; those of slots without rows do not count


Way = Callable[[Inputs, bool], Outputs]


def as_given(inputs: Inputs) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Op:
    """An op of ours, and everything that computes the same.

    define:  the definition. ways: "ours", and others by name. cost: (inputs, backward) -> bytes, FLOPs.
    spans:   point -> shape and standard deviation of each weight of one user.
    prepare: fills in what the op needs beyond x, gradients and weights.
    passes:  what is measured: False forward, True forward and backward.
    size:    what `rank` of a point means here, if anything. ranked: whether a user's own may be smaller.
    launcher: it has no PyTorch path and runs where kernels run. in_place: a run changes its inputs.
    filled:  a user's rows are multiples of TILE, as in training.
    accurate: ways whose outputs are fp32 and owe fp32's accuracy, whatever the dtype of x.
    """

    define: Way
    ways: dict[str, Way]
    cost: Callable[[Inputs, bool], tuple[int, int]]
    spans: Callable[[Point], Sequence[tuple[tuple[int, ...], float]]]
    prepare: Callable[[Inputs], Inputs] = as_given
    passes: tuple[bool, ...] = (True,)
    size: str | None = "rank"
    ranked: bool = False
    launcher: bool = False
    filled: bool = False
    in_place: bool = False
    accurate: tuple[str, ...] = ()


def make(
    op: Op, point: Point, device: torch.device | str, dtype: torch.dtype, seed: int = 0, mixed_ranks: bool = False
) -> Inputs:
    """A batch, drawn on the device. Slots are in another order than rows."""
    draw = torch.Generator(device).manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, device=device)  # noqa: E731
    lengths, U = lengths_of(point, seed)
    if op.filled:
        lengths = [-(-length // TILE) * TILE for length in lengths]
    slots = np.random.default_rng(seed).permutation(U)[: len(lengths)]
    ranks = None
    if mixed_ranks and op.ranked:
        ranks = torch.tensor([(1, point.rank, point.rank // 2 + 1)[u % 3] for u in range(U)], device=device).int()

    spans, live = list(op.spans(point)), torch.from_numpy(slots).to(device)
    sizes = [int(np.prod(shape)) for shape, _ in spans]
    bank = torch.full((U, -(-sum(sizes) // 64) * 64), torch.nan, dtype=dtype, device=device)
    weights = []
    for part, (shape, std) in zip(bank[:, : sum(sizes)].split(sizes, 1) if sizes else (), spans):
        weights.append(part.unflatten(1, shape))
        weights[-1][live] = (std * randn(len(slots), *shape)).to(dtype)
        if ranks is not None and shape[0] == point.rank:
            weights[-1][torch.arange(point.rank, device=device) >= ranks[:, None]] = torch.nan
    T = sum(lengths)
    inputs = Inputs(
        point, randn(T, point.K).to(dtype), tuple(randn(T, N).to(dtype) for N in point.widths), tuple(weights), bank,
        torch.rand(U, generator=draw, device=device) + 0.5, ranks, *_plans(slots, lengths, device),
    )  # fmt: skip
    return op.prepare(inputs)


def pick(op: Op, inputs: Inputs, chosen: Sequence[int]) -> Inputs:
    """The batch of these segments alone, in this order, on the same bank."""
    starts, device = inputs.segments.starts, inputs.x.device
    rows = torch.from_numpy(np.concatenate([np.arange(starts[s], starts[s + 1]) for s in chosen])).to(device)
    segments, groups = _plans(inputs.segments.slots[chosen], np.diff(starts)[chosen], device)
    return op.prepare(replace(inputs, x=inputs.x[rows], grad_ys=tuple(grad_y[rows] for grad_y in inputs.grad_ys),
                              segments=segments, groups=groups))  # fmt: skip


def _plans(slots: np.ndarray, lengths: Sequence[int], device: torch.device | str) -> tuple[Segments, Groups]:
    segments = Segments.build(slots, lengths, device)
    return segments, Groups.build(segments, device)


# ---- Right? --------------------------------------------------------------------------------------------------------


@contextmanager
def poisoned_memory():
    """Whatever torch.empty returns is full of NaN: numbers that an op forgets to write show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # filling comes with it, as a debugging aid of PyTorch's
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(op: Op, way: str, inputs: Inputs, backward: bool) -> Outputs:
    """A run whose outputs were NaN before. Inputs stay as they are."""
    if op.in_place:
        inputs = op.prepare(inputs.map(Tensor.clone))
    for buffer in inputs.buffers:
        buffer.fill_(torch.nan)
    if way != "ours":
        return op.ways[way](inputs, backward)
    with poisoned_memory():
        return op.ways[way](inputs, backward)


def exactly(op: Op, inputs: Inputs, backward: bool) -> Outputs:
    """The definition in fp64."""
    return op.define(inputs.map(Tensor.double), backward)


def tolerance(op: Op, inputs: Inputs, way: str = "ours") -> float:
    """The largest relative error a correct way may have."""
    return TOLERANCE[torch.float32 if way in op.accurate else inputs.x.dtype]


def relative_error(outputs: Outputs, exact: Outputs, inputs: Inputs) -> float:
    """The largest |out - exact| / |exact| of all outputs; NaN if any number is NaN that should not be.

    A baseline may keep the last of the outputs of rows to itself.
    """
    live = inputs.groups.slots
    pairs = [*zip(outputs.rows, exact.rows), *((a[live], b[live]) for a, b in zip(outputs.slots, exact.slots))]
    errors = [((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs]
    return max(errors, key=lambda error: (error != error, error))
