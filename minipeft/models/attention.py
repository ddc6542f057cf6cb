"""Attention on packed rows: who sees whom, and softmax(q k^T) v among them.

Rows of many sequences lie end to end (rows.py), and attention is the one place where a base must know which of them
belong together. `Packed.plan` says it for a batch:

    a decoder            each row sees its sequence's rows up to itself                    causal
    an encoder           each row sees all rows of its sequence
    cross-attention      each row sees all rows of another sequence: T5's decoder, its encoder's
    a shared prefix      each row sees a prefix's rows first, then its own sequence's up to itself: several labels
                         after one prompt
    the last layer       the same, of a sequence's last rows alone: those that are read (top.py)

Attention gathers sequences of similar length into padded buckets, runs `scaled_dot_product_attention` on each, and
gathers the results back. The padded length of a sequence depends on its own length alone, never on the company, so its
bits do not either. On a GPU flash attention takes the rows where they lie instead, wherever it can: `Packed.way`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.models.layers import stable


def flash_attention(*args, **options) -> Tensor:
    """torch's own, imported where it is needed: its signature is another before torch 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*args, **options)


@dataclass(frozen=True)
class Bucket:
    """Sequences of one padded length: n members of q_width rows each, which see k_width rows each.

    before:  [n, 1] int32: how many rows a member sees before its own first; [1, 1] where all members agree.
    real:    [n, k_width] bool: which places of the keys hold a row; None: all.
    """

    num: int
    q_width: int
    k_width: int
    before: Tensor
    real: Tensor | None

    def ages(self) -> Tensor:
        """[n or 1, q_width, k_width] int32: how many places before the row each row lies that it may see; negative:
        after. Made where a bias reads it: of a long sequence it is large."""
        places, own = self._places()
        return own[:, :, None] - places

    def reached(self, window: int | None) -> Tensor:
        """[n or 1, q_width, k_width] bool: which ages are 0 or more, and below window."""
        places, own = self._places()
        own = own.clamp(max=self.k_width - 1)  # what is only there to fill must see something too, or it makes NaN
        seen = places <= own[:, :, None]
        return seen if window is None else seen & (places > own[:, :, None] - window)

    def _places(self) -> tuple[Tensor, Tensor]:
        """The keys' places [k_width], and those of the members' own rows among them [n or 1, q_width]."""
        places = torch.arange(max(self.q_width, self.k_width), dtype=torch.int32, device=self.before.device)
        return places[: self.k_width], self.before + places[: self.q_width]


class Spans(NamedTuple):
    """Rows of sequences, on the host: the first one and how many, [n] int64 each."""

    first: np.ndarray
    lengths: np.ndarray


class Stretches(NamedTuple):
    """Sequences that see one stretch of rows each, in the same order: what flash attention wants to know.

    q, k: [n + 1] int32, where each sequence, and what it sees, begins, and the end. longest_q, longest_k: most rows.
    """

    q: Tensor
    k: Tensor
    longest_q: int
    longest_k: int


@dataclass(frozen=True)
class Layout:
    """Rows in padded places, buckets one after another, and the way back.

    index:  [M] int64. Place -> row. A padding place repeats its sequence's last row, which is finite and never seen.
    places: [T] int64. Row -> the place where it is at home; 0 of a row that is nowhere.
    absent: [a] int64, the rows that are nowhere; None: there are none.
    copies: where rows stand besides at home; None: nowhere.
    """

    index: Tensor
    places: Tensor
    absent: Tensor | None
    copies: "Copies | None"

    @staticmethod
    def plan(index: np.ndarray, rows: np.ndarray, places: np.ndarray, num_rows: int, on: Callable) -> "Layout":
        """rows, places: [m] each, which row stands where, padding places left out; a row's first is its home."""
        home, number, copies = np.zeros(num_rows, dtype=np.int64), np.bincount(rows, minlength=num_rows), None
        if number.max() > 1:
            _, first = np.unique(rows, return_index=True)
            others = np.delete(np.arange(len(rows)), first)
            copies = Copies.plan(rows[others], places[others], on)
            rows, places = rows[first], places[first]
        home[rows] = places
        absent = np.flatnonzero(number == 0)
        return Layout(on(index), on(home), on(absent) if len(absent) else None, copies)


@dataclass(frozen=True)
class Packed:
    """Who sees whom in a batch.

    q, k:    where the rows that see, and those that are seen, stand. A prefix's rows are at home in its own sequence,
             or where that is not there (of_last) in the first that sees them.
    q_pads:  int64, the places of q that are no row's.
    square:  each sequence sees itself and nothing else.
    stretches: None where a sequence sees a prefix too, sequences see others than in their order, or of last rows alone.
    """

    q: Layout
    k: Layout
    q_pads: Tensor
    buckets: tuple[Bucket, ...]
    causal: bool
    square: bool
    stretches: Stretches | None

    @staticmethod
    def plan(
        q_lengths: np.ndarray, causal: bool, device: torch.device | str, k_lengths: np.ndarray | None = None,
        sees: np.ndarray | None = None, shared: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> "Packed":  # fmt: skip
        """The plan for sequences of these lengths [n], end to end.

        Args:
            k_lengths: [m] lengths of the sequences that are seen, end to end, for cross-attention; None: their own.
            sees:      [n] which of those each sequence sees; None: its own number.
            shared:    first row and length, [n] each, of the rows that a sequence sees before its own; length 0: none.
        """
        of_keys = q_lengths if k_lengths is None else k_lengths
        in_order = sees is None or np.array_equal(sees, np.arange(len(of_keys)))
        sees = np.arange(len(of_keys)) if sees is None else sees
        prefix = (np.zeros_like(q_lengths),) * 2 if shared is None else shared
        q, k = Spans(_starts(q_lengths), q_lengths), Spans(_starts(of_keys)[sees], of_keys[sees])
        has_prefix = bool(prefix[1].any())
        stretches = None
        if in_order and not has_prefix:
            ends = [torch.from_numpy(np.append(0, np.cumsum(n)).astype(np.int32)).to(device) for n in (q[1], k[1])]
            stretches = Stretches(*ends, int(q_lengths.max()), int(of_keys.max()))
        square = k_lengths is None and not has_prefix
        return Packed._plan(q, int(q_lengths.sum()), k, int(of_keys.sum()), Spans(*prefix), causal, square, stretches,
                            device)  # fmt: skip

    @staticmethod
    def of_last(
        q: Spans, num_q: int, k: Spans, num_k: int, prefix: Spans, device: torch.device | str
    ) -> "Packed":  # fmt: skip
        """The plan of a decoder for the last rows of sequences alone, as they see when all rows are there.

        q: where those rows stand among num_q rows. k: their sequences, whole, among num_k rows. prefix: the rows that
        each sequence goes on from; length 0: none. For other rows of q attention gives 0, and no gradient.
        """
        return Packed._plan(q, num_q, k, num_k, prefix, True, False, None, device)

    @staticmethod
    def _plan(
        q: Spans, num_q: int, k: Spans, num_k: int, prefix: Spans, causal: bool, square: bool,
        stretches: Stretches | None, device: torch.device | str,
    ) -> "Packed":  # fmt: skip
        on = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(device)  # noqa: E731
        q_widths, k_widths = padded_length(q.lengths), padded_length(prefix.lengths + k.lengths)
        before_own = prefix.lengths + (k.lengths - q.lengths if causal else 0)
        q_index, k_index, buckets = [], [], []
        of_q, of_k, of_prefix = [], [], []  # pairs of (rows, places)
        q_filled = k_filled = 0
        for q_width, k_width in np.unique(np.stack([q_widths, k_widths], 1), axis=0).tolist():
            members = np.flatnonzero((q_widths == q_width) & (k_widths == k_width))
            column = lambda per_sequence: per_sequence[members][:, None]  # noqa: B023, E731  # [n, 1]
            q_cols, k_cols = np.arange(q_width), np.arange(k_width)
            q_rows = column(q.first) + np.minimum(q_cols, column(q.lengths) - 1)  # [n, q_width]
            real = q_cols < column(q.lengths)
            of_q.append((q_rows[real], q_filled + np.flatnonzero(real)))
            q_filled += q_rows.size
            own = column(k.first) + np.minimum(k_cols - column(prefix.lengths), column(k.lengths) - 1)
            k_rows = np.where(k_cols < column(prefix.lengths), column(prefix.first) + k_cols, own)  # [n, k_width]
            foreign = k_cols < column(prefix.lengths)
            seen = k_cols < column(prefix.lengths + k.lengths)
            of_k.append((k_rows[seen & ~foreign], k_filled + np.flatnonzero(seen & ~foreign)))
            of_prefix.append((k_rows[foreign], k_filled + np.flatnonzero(foreign)))
            k_filled += k_rows.size
            q_index.append(q_rows.ravel())
            k_index.append(k_rows.ravel())
            before = column(before_own).astype(np.int32)
            before = before[:1] if (before == before[0]).all() else before
            buckets.append(Bucket(len(members), q_width, k_width, on(before), None if seen.all() else on(seen)))
        q_index, k_index = np.concatenate(q_index), np.concatenate(k_index)
        q_rows, q_places = map(np.concatenate, zip(*of_q))
        k_rows, k_places = map(np.concatenate, zip(*of_k, *of_prefix))
        is_pad = np.ones(len(q_index), dtype=bool)
        is_pad[q_places] = False
        return Packed(Layout.plan(q_index, q_rows, q_places, num_q, on),
                      Layout.plan(k_index, k_rows, k_places, num_k, on), on(np.flatnonzero(is_pad)), tuple(buckets),
                      causal, square, stretches)  # fmt: skip

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None,
        biases: Sequence[Tensor] | None = None, scale: float | None = None, softcap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """softmax(scale q k^T + bias) v among the rows that each row sees; grouped queries where q has more heads.

        Args:
            layer:   which layer asks; a cache keeps each layer's keys apart (generate.py), a plan does not care.
            q:       [T, H, D]. k, v: [T', H_kv, D], H a multiple of H_kv. With position encoding applied.
            window:  each row sees itself and the window - 1 rows before it (Mistral); None: all that the plan allows.
            biases:  what `scores_bias` returned, added to the scores; it hides what is not seen, windows included.
            scale:   None: 1 / sqrt(D). softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        Returns:
            [T, H, D], dtype of q.
        """
        if self.way(q.device, q.dtype, q.shape[2], plain=biases is None and softcap is None) == "varlen":
            return self.varlen(q, k, v, window, scale)
        return self.padded(q, k, v, window, biases, scale, softcap)

    def way(self, device: torch.device, dtype: torch.dtype, head_dim: int, plain: bool) -> str:
        """How a call is computed: "varlen" or "padded".

        "varlen" wherever flash attention can: a GPU of compute capability 8.0 or more, bf16 or fp16, heads of up to 256
        features, scores without bias and soft cap (`plain`), sequences that see one stretch of rows each. From torch
        2.13 on, whose varlen_attn has windows and grouped queries.
        """
        flash = device.type == "cuda" and torch.__version__ >= (2, 13) and dtype in (torch.bfloat16, torch.float16)
        flash = flash and torch.cuda.get_device_capability(device) >= (8, 0)
        fits = head_dim <= 256 and head_dim % 8 == 0 and self.stretches is not None
        return "varlen" if flash and fits and plain else "padded"

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, scale: float | None = None,
        attention: Callable[..., Tensor] = flash_attention,
    ) -> Tensor:  # fmt: skip
        """A call without padding, by torch.nn.attention.varlen.varlen_attn or another `attention` called like it.

        Its backward pass adds up grad_q in no fixed order, unless torch.use_deterministic_algorithms asks for one.
        """
        before = -1 if window is None else window - 1  # rows before its own that a row sees; -1: all
        return attention(q, k, v, *self.stretches, scale=scale, window_size=(before, 0) if self.causal else (-1, -1),
                         enable_gqa=q.shape[1] != k.shape[1])  # fmt: skip

    def padded(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, biases: Sequence[Tensor] | None = None,
        scale: float | None = None, softcap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """A call by scaled_dot_product_attention, bucket by bucket."""
        grouped = q.shape[1] != k.shape[1]
        q, k, v = (_Regroup.apply(x, layout) for x, layout in ((q, self.q), (k, self.k), (v, self.k)))  # [M, H, D]
        # Split and not sliced: a slice's gradient is as large as all buckets, zeros but for its own.
        q = q.split([bucket.num * bucket.q_width for bucket in self.buckets])
        k, v = (x.split([bucket.num * bucket.k_width for bucket in self.buckets]) for x in (k, v))
        outputs = []
        for i, bucket in enumerate(self.buckets):
            own_q = q[i].unflatten(0, (bucket.num, bucket.q_width)).transpose(1, 2)  # [n, H, q_width, D]
            own_k, own_v = (x[i].unflatten(0, (bucket.num, bucket.k_width)).transpose(1, 2) for x in (k, v))
            if softcap is not None:
                assert biases is None, "no base has both"
                mask = self._mask(bucket, window, always=True)
                y = capped_attention(own_q, own_k, own_v, mask, scale, softcap)
            else:
                mask = self._mask(bucket, window) if biases is None else biases[i]
                is_causal = self.causal and mask is None
                own = own_q.shape
                if heads_as_rows := grouped and mask is not None and biases is None:
                    # No kernel of PyTorch's for GPUs takes a mask and grouped queries: a group's heads become rows.
                    own_q = own_q.unflatten(1, (own_k.shape[1], -1)).flatten(2, 3)
                    mask = mask.repeat(1, 1, own[1] // own_k.shape[1] if mask.shape[2] > 1 else 1, 1)
                y = F.scaled_dot_product_attention(own_q, own_k, own_v, attn_mask=mask, is_causal=is_causal,
                                                   scale=scale, enable_gqa=grouped and not heads_as_rows)  # fmt: skip
                y = y.unflatten(2, (-1, own[2])).flatten(1, 2) if heads_as_rows else y
            outputs.append(y.transpose(1, 2).flatten(0, 1))  # [n * q_width, H, D]
        return _Ungroup.apply(outputs[0] if len(outputs) == 1 else torch.cat(outputs), self.q, self.q_pads)

    def _mask(self, bucket: Bucket, window: int | None, always: bool = False) -> Tensor | None:
        """[n or 1, 1, q_width, k_width] bool, what is seen; None where the causal kernel or no mask says the same."""
        windowed = window is not None and bucket.k_width > window
        if self.causal and (always or windowed or not self.square):  # what pads keys lies after every real row
            return bucket.reached(window if windowed else None)[:, None]
        if self.causal or bucket.real is None:
            return bucket.before.new_ones(1, 1, 1, 1, dtype=torch.bool) if always else None
        return bucket.real[:, None, None]  # [n, 1, 1, k_width]

    def scores_bias(self, bias_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """What T5 adds to the scores, for every bucket: -inf where a row is not seen. Once per pass, for all layers.

        bias_of: ages [..., q_width, k_width] -> [..., H, q_width, k_width].
        """
        biases = []
        for bucket in self.buckets:
            bias, mask = bias_of(bucket.ages()), self._mask(bucket, None, always=self.causal)
            biases.append(bias if mask is None else torch.where(mask, bias, -torch.inf))
        return biases


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float) -> Tensor:
    """softmax(softcap * tanh(scale q k^T / softcap)) v where mask; [n, H, width, D] each, no fused kernel does it."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = soft_cap(q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale), softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    # Not -inf: a padding row behind a prefix may see nothing, and its NaN would reach the gradients of real rows.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, wide).to(v.dtype) @ v


class _SoftCap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cap):
        y = stable(torch.tanh, x / cap)
        ctx.save_for_backward(y)
        return y * cap

    @staticmethod
    def backward(ctx, grad_y):
        return stable(torch.ops.aten.tanh_backward, grad_y.contiguous(), *ctx.saved_tensors), None


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap): x where it is small, never past +-cap (Gemma Team 2024, arXiv:2408.00118, section 2)."""
    return _SoftCap.apply(x, cap)


def padded_length(lengths: np.ndarray) -> np.ndarray:
    """Each length rounded up to 8, 16, 24, 32, 48, 64, 96, 128, ...: at most half as long again past 16 rows."""
    steps = [8, 16, 24, 32]
    while steps[-1] < lengths.max():
        steps.append(steps[-1] * 3 // 2 if (steps[-1] & (steps[-1] - 1)) == 0 else steps[-1] * 4 // 3)
    steps = np.array(steps)
    return steps[np.searchsorted(steps, lengths)]


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


@dataclass(frozen=True)
class Copies:
    """Where rows that several sequences see, their prefix, stand in the padded layout besides at home.

    rows:   [n] int64, those with the most copies first.
    places: of the first copy of each, of the second of those that have two, and so on: of rows[: its length].
    """

    rows: Tensor
    places: tuple[Tensor, ...]

    @staticmethod
    def plan(copied: np.ndarray, copies: np.ndarray, on: Callable[[np.ndarray], Tensor]) -> "Copies":
        """copied, copies: [m] each, which row stands at which place. A row's copies keep their order."""
        order = np.argsort(copied, kind="stable")
        rows, first, number = np.unique(copied[order], return_index=True, return_counts=True)
        most_first = np.argsort(-number, kind="stable")
        rows, first, number = rows[most_first], first[most_first], number[most_first]
        places = tuple(on(copies[order[first[number > i] + i]]) for i in range(number[0]))
        return Copies(on(rows), places)

    def add_(self, grad_rows: Tensor, grad: Tensor) -> None:
        """Add the copies' gradients [M, ...] to their rows' [T, ...]: a row's in order, whoever else is there."""
        total = grad.new_zeros(len(self.rows), *grad.shape[1:])
        for places in self.places:
            total[: len(places)] += grad.index_select(0, places)
        grad_rows.index_add_(0, self.rows, total)


class _Regroup(torch.autograd.Function):
    """x in padded places, where the gradient is another gather, not a scatter.

    Padding places copy a row too, but nothing depends on them, so their gradient is zero and may be dropped.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad, layout = grad.contiguous(), ctx.layout
        grad_rows = _rows(grad, layout)
        if layout.copies is not None:
            layout.copies.add_(grad_rows, grad)
        return grad_rows, None


class _Ungroup(torch.autograd.Function):
    """Padded places -> rows, whose gradient is another gather, and zero at the padding places `pads`."""

    @staticmethod
    def forward(ctx, x: Tensor, layout: Layout, pads: Tensor) -> Tensor:
        ctx.layout, ctx.pads = layout, pads
        return _rows(x, layout)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.layout.index).index_fill_(0, ctx.pads, 0.0), None, None


def _rows(x: Tensor, layout: Layout) -> Tensor:
    """What stands at the rows' homes: [M, ...] -> [T, ...], 0 of a row that is nowhere."""
    rows = x.index_select(0, layout.places)
    return rows if layout.absent is None else rows.index_fill_(0, layout.absent, 0.0)
