"""The two products of a LoRA, one after the other or in one launch, forward and backward.

    v[t] = s_u first_u x[t]              shrink, K -> R      slot u owns row t
    y[t] = second_u^T v[t]               expand, R -> N

    forward    (x, A, Bt)       ->  (v, delta)               LoRA's A [R, K] and B^T [R, N], both rank-major,
    backward   (grad_y, Bt, A)  ->  (w, grad_x)              so both directions are the same two products

M sites may share their input (q|k|v, gate|up). Their As lie one below the other, [M * R, K], so one shrink serves them
all. Their Bs make a block-diagonal second: columns of site m read rank rows m * R .. only. They are stored one after
the other, [R, N_m] each; y has the sites' columns side by side. Where gradients come back to one x from M sites, each
has its own shrink, and one ordinary expand of rank M * R adds them up.

Programs and rows. A tile is up to BLOCK_T rows of one segment, from the segment's own first row, so a program sees one
user, and no sum crosses users. Row-fused: one program has a tile, keeps v in registers between the products, and reads
x and writes y once. Split: few tiles would leave most of a GPU idle and many rank rows would not fit, so programs share
a tile instead: (tile, plane) sums plane() columns of x into its own plane of partial sums, and (tile, block of columns)
adds the planes up in order. The row-fused program sums plane by plane as well: both give the same bits, so which one
ran never shows.

Bytes, with e per number: e * T * (K + N) for the rows, e * R * (K + N) per slot that has rows, e * T * M * R for v
(kept for the weight gradients); split writes and reads 4 * T * M * R * planes more. That is 2 R FLOPs per number read:
these kernels wait for memory up to a rank of about 100.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from minipeft_kernels.blocks import MOST_RANKS, load_block, my_ranks, my_rows
from minipeft_kernels.dropout import drop_key, keep_block
from minipeft_kernels.dtypes import constexpr_function, jit, padded, rounded, store, tl
from minipeft_kernels.layouts import check_table
from minipeft_kernels.segments import Plan

FEW_TILES = 264  # two programs for every multiprocessor of the largest GPUs we know (132)
MOST_FUSED_RANKS = 64  # rank rows (all sites) whose v one program holds


@constexpr_function
def plane():
    """Columns of x that are summed before they are added to the rest; the same whether split or not.

    Triton keeps compiled kernels by their source and that of the functions they call: the number stands in it.
    """
    return 1024


def num_planes(K: int) -> int:
    """Planes of an input of K columns."""
    return -(-K // plane())


@jit
def _shrink_plane(x_ptr, rows, row_ok, first_ptr, ranks, used, first_row_stride, first_col, end_col, key, threshold,
                  positions, DROPOUT: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, RANKS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Sum over columns first_col .. end_col - 1 of x times first: [BLOCK_T, RANKS] fp32."""
    part = tl.zeros((BLOCK_T, RANKS), tl.float32)
    for k in range(first_col, end_col, BLOCK):
        x = load_block(x_ptr, rows, row_ok, K, k, K, BLOCK)  # [BLOCK_T, BLOCK]
        if DROPOUT:
            x = tl.where(keep_block(key, threshold, positions, k, BLOCK_T, BLOCK), x, 0.0)
        first = load_block(first_ptr, ranks, used, first_row_stride, k, K, BLOCK)  # [RANKS, BLOCK]
        part = tl.dot(x, tl.trans(first), part, input_precision="ieee")
    return part


@jit
def _expand_block(v, second_ptr, ranks, used, sites_ptr, first_col, R: tl.constexpr, N: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """v [BLOCK_T, RANKS] times one block of columns of second: [BLOCK_T, BLOCK] fp32."""
    if sites_ptr is None:
        second = load_block(second_ptr, ranks, used, N, first_col, N, BLOCK)  # [RANKS, BLOCK]
    else:  # this block of columns belongs to one site and reads that site's ranks only
        entry = sites_ptr + first_col // BLOCK * 3
        start, width = tl.multiple_of(tl.load(entry + 1), 16), tl.multiple_of(tl.load(entry + 2), 16)
        mine = used & (ranks // R == tl.load(entry))
        second = load_block(second_ptr + R * start, ranks % R, mine, width, first_col - start, N, BLOCK)
    return tl.dot(v, second, input_precision="ieee")


@jit
def _store_block(y, y_ptr, rows, row_ok, first_col, positions, segment, drop_ptr, N: tl.constexpr,
                 BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Store columns first_col .. of y, after dropout where y is the gradient of a dropped-out input."""
    if drop_ptr is not None:
        key, threshold, factor = drop_key(drop_ptr, segment)
        y = tl.where(keep_block(key, threshold, positions, first_col, BLOCK_T, BLOCK), y * factor, 0.0)
    cols = first_col + tl.arange(0, BLOCK)
    ok = row_ok[:, None]
    if N % BLOCK != 0:
        ok = ok & (cols < N)[None, :]
    store(y_ptr + rows[:, None] * N + cols[None, :], y, ok)


@jit
def _shrink_expand_kernel(
    x_ptr, first_ptr, second_ptr, v_ptr, y_ptr,  # [T, K], [U, M * R, K], second, [T, M * R], [T, N]
    tiles_ptr, segments_ptr, scale_ptr, ranks_ptr,  # [n, 2], [S, 3], [U], [U] or None: all R
    sites_ptr,  # [N / BLOCK, 3]: each block of columns' site, that site's first column and width; None: one site
    drop_x_ptr, drop_y_ptr,  # [S, 2] or None: dropout on x (forward), on y (backward)
    first_stride, second_stride,
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """v[t] = s first x[t] and y[t] = second^T v[t]. One program = BLOCK_T rows of one segment."""
    # 1. Which rows are mine, and which matrices do they use?
    PLANE: tl.constexpr = plane()
    segment, rows, row_ok, positions, slot = my_rows(tiles_ptr, segments_ptr, BLOCK_T)
    RANKS: tl.constexpr = padded(M * R)
    ranks, used = my_ranks(ranks_ptr, slot, R, M)
    first_ptr += slot * first_stride
    second_ptr += slot * second_stride
    scale = tl.load(scale_ptr + slot)
    key, threshold = 0, 0
    if drop_x_ptr is not None:
        key, threshold, factor = drop_key(drop_x_ptr, segment)
        scale *= factor

    # 2. Shrink, plane by plane, in fp32.
    acc = tl.zeros((BLOCK_T, RANKS), tl.float32)
    for k in range(0, K, PLANE):
        acc += _shrink_plane(x_ptr, rows, row_ok, first_ptr, ranks, used, K, k, min(k + PLANE, K), key, threshold,
                             positions, drop_x_ptr is not None, K, BLOCK_T, RANKS, BLOCK)  # fmt: skip
    acc *= scale
    v = rounded(acc, v_ptr.dtype.element_ty)
    store(v_ptr + rows[:, None] * (M * R) + ranks[None, :], acc, row_ok[:, None] & (ranks < M * R)[None, :])

    # 3. Expand, block by block of columns.
    for n in range(0, N, BLOCK):
        y = _expand_block(v, second_ptr, ranks, used, sites_ptr, n, R, N, BLOCK)
        _store_block(y, y_ptr, rows, row_ok, n, positions, segment, drop_y_ptr, N, BLOCK_T, BLOCK)


@jit
def _shrink_kernel(
    x_ptr, first_ptr, planes_ptr,  # [T, K], [U, R, K], planes [planes, T, V] fp32, of which R columns are written
    tiles_ptr, segments_ptr, ranks_ptr, drop_ptr,  # [n, 2], [S, 3], [U] or None, [S, 2] or None
    first_stride, first_row_stride, plane_stride, V,
    K: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """planes[p, t] = first x[t] over the p-th plane() columns. One program = BLOCK_T rows of one segment, one plane."""
    PLANE: tl.constexpr = plane()
    segment, rows, row_ok, positions, slot = my_rows(tiles_ptr, segments_ptr, BLOCK_T)
    RANKS: tl.constexpr = padded(M * R)
    ranks, used = my_ranks(ranks_ptr, slot, R, M)
    key, threshold = 0, 0
    if drop_ptr is not None:
        key, threshold, _ = drop_key(drop_ptr, segment)
    p = tl.program_id(1)
    part = _shrink_plane(x_ptr, rows, row_ok, first_ptr + slot * first_stride, ranks, used, first_row_stride,
                         p * PLANE, tl.minimum((p + 1) * PLANE, K), key, threshold, positions,
                         drop_ptr is not None, K, BLOCK_T, RANKS, BLOCK)  # fmt: skip
    tl.store(planes_ptr + p.to(tl.int64) * plane_stride + rows[:, None] * V + ranks[None, :], part,
             row_ok[:, None] & (ranks < M * R)[None, :])  # fmt: skip


@jit
def _expand_kernel(
    planes_ptr, second_ptr, v_ptr, y_ptr,  # [planes, T, M * R] fp32, second, [T, M * R], [T, N] or None: v alone
    tiles_ptr, segments_ptr, scale_ptr, ranks_ptr, sites_ptr, drop_x_ptr, drop_y_ptr,  # as in _shrink_expand_kernel
    second_stride, plane_stride, num_planes,
    N: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """v = s * the sum of the planes in order; y = second^T v. One program = BLOCK_T rows, BLOCK columns of y."""
    # 1. Which rows?
    segment, rows, row_ok, positions, slot = my_rows(tiles_ptr, segments_ptr, BLOCK_T)
    RANKS: tl.constexpr = padded(M * R)
    ranks, used = my_ranks(ranks_ptr, slot, R, M)
    scale = tl.load(scale_ptr + slot)
    if drop_x_ptr is not None:
        _, _, factor = drop_key(drop_x_ptr, segment)
        scale *= factor

    # 2. v, the same in every program of this tile; the first one keeps it.
    v_ok = row_ok[:, None] & (ranks < M * R)[None, :]
    places = rows[:, None] * (M * R) + ranks[None, :]
    acc = tl.zeros((BLOCK_T, RANKS), tl.float32)
    for _ in range(num_planes):
        acc += tl.load(planes_ptr + places, v_ok, other=0.0)
        planes_ptr += plane_stride
    acc *= scale
    store(v_ptr + places, acc, v_ok & (tl.program_id(1) == 0))

    # 3. One block of columns.
    if y_ptr is not None:
        n = tl.program_id(1) * BLOCK
        v = rounded(acc, v_ptr.dtype.element_ty)
        y = _expand_block(v, second_ptr + slot * second_stride, ranks, used, sites_ptr, n, R, N, BLOCK)
        _store_block(y, y_ptr, rows, row_ok, n, positions, segment, drop_y_ptr, N, BLOCK_T, BLOCK)


# ---- Launchers -----------------------------------------------------------------------------------------------------


def configuration(num_ranks: int, itemsize: int) -> dict[str, int]:
    """Block sizes for this many rank rows and bytes per number: never of the batch, or bits would depend on it.

    tests/test_aot.py compiles every branch for three chips, for up to MOST_RANKS rank rows: no spilled register, no
    more shared memory than the chip has, bf16 on the matrix unit. fp32 keeps full precision, which only AMD's matrix
    unit does too: elsewhere threads multiply from their own registers, so many rank rows get smaller blocks.
    """
    assert num_ranks <= MOST_RANKS
    if itemsize > 2:
        if num_ranks <= 64:
            return {"BLOCK_T": 32, "BLOCK": 64, "num_warps": 4 if num_ranks <= 16 else 8, "num_stages": 3}
        return {"BLOCK_T": 16, "BLOCK": 32, "num_warps": 8, "num_stages": 2}
    if num_ranks <= 32:
        return {"BLOCK_T": 32, "BLOCK": 128, "num_warps": 4 if num_ranks <= 16 else 8, "num_stages": 4}
    if num_ranks <= 64:
        return {"BLOCK_T": 16, "BLOCK": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_T": 32, "BLOCK": 32, "num_warps": 4, "num_stages": 3}


def can_join(widths: Sequence[int], num_ranks: int, dtype: torch.dtype) -> bool:
    """Whether sites of these output widths and rank rows in all can share one launch.

    No more than MOST_RANKS rank rows, and blocks of columns must not straddle two sites.
    """
    if len(widths) == 1 or num_ranks > MOST_RANKS:
        return len(widths) == 1
    return all(width % configuration(num_ranks, dtype.itemsize)["BLOCK"] == 0 for width in widths)


def site_table(
    widths: Sequence[int], num_ranks: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor | None:
    """[blocks, 3] int32: the site of each block of columns, its first column and its width. None for one site.

    Raises:
        ValueError: these widths cannot share a launch.
    """
    if len(widths) == 1:
        return None
    if num_ranks > MOST_RANKS:
        raise ValueError(f"site_table: {len(widths)} sites of {num_ranks} rank rows in all cannot share a launch, "
                         f"which takes {MOST_RANKS}. Give each site a launch of its own.")
    block, start, table = configuration(num_ranks, dtype.itemsize)["BLOCK"], 0, []
    if not can_join(widths, num_ranks, dtype):
        raise ValueError(f"site_table: sites of {list(widths)} columns cannot share a launch: each must be a multiple "
                         f"of {block}. Give each site a launch of its own.")
    for site, width in enumerate(widths):
        table += [(site, start, width)] * (width // block)
        start += width
    return torch.tensor(table, dtype=torch.int32, device=device)


def check_sites(op: str, sites: Tensor | None, Bts: Sequence[Tensor]) -> None:
    """Raises ValueError unless Bts, M of [U, R, N_m], lie as kernels read them and sites can be their site_table."""
    (U, R, _), dtype, widths = Bts[0].shape, Bts[0].dtype, [Bt.shape[2] for Bt in Bts]
    if len(Bts) == 1:
        if sites is not None:
            raise ValueError(f"{op}: a table of several sites but one Bt; leave sites out.")
        return
    if sites is None or not can_join(widths, len(Bts) * R, dtype):
        raise ValueError(f"{op}: {len(Bts)} sites of {widths} columns at once need `sites`, the site_table of these "
                         f"widths; got {'none' if sites is None else 'one of other widths'}.")
    block = configuration(len(Bts) * R, dtype.itemsize)["BLOCK"]
    check_table(op, "sites (one row per block of columns)", sites, (sum(widths) // block, 3), torch.int32)
    for Bt, after in pairwise(Bts):
        end = Bt.data_ptr() + R * Bt.shape[2] * dtype.itemsize
        if U and (after.data_ptr() != end or after.stride(0) != Bt.stride(0)):
            raise ValueError(f"{op}: the Bts of several sites must lie one right after the other in every slot; make "
                             "them views of one bank, or give each site a call of its own.")


def shrink_expand(
    x: Tensor, first: Tensor, second: Tensor, y: Tensor | None, scale: Tensor, ranks: Tensor | None, plan: Plan,
    sites: Tensor | None = None, drop_x: Tensor | None = None, drop_y: Tensor | None = None,
    split: bool | None = None,
) -> Tensor:  # fmt: skip
    """v[t] = s_u first_u x[t], which is returned; y[t] = second_u^T v[t], written into y. Shapes as in segment_lora.py.

    Args:
        x:      [T, K]; y: [T, N], contiguous, whatever it held is overwritten; None: v is all that is wanted.
        first:  [U, M * R, K]; second: [U, R, N], or the first of M matrices that lie one after another, with `sites`.
                Views of the bank: any stride between slots.
        sites:  site_table of the M sites, or None.
        drop_x, drop_y: [S, 2] of dropout.py: x is dropped out before the shrink, y after the expand.
        split:  whether programs share tiles; None: if there are few tiles or many ranks. No bit depends on it.
    """
    (T, K), num_ranks = x.shape, first.shape[1]
    R = second.shape[1]
    M = num_ranks // R if sites is not None else 1
    config = configuration(num_ranks, x.itemsize)
    tiles = plan.tiles[config["BLOCK_T"]]
    assert x.is_contiguous() and (y is None or y.is_contiguous())
    if split or y is None or (split is None and (len(tiles) < FEW_TILES or num_ranks > MOST_FUSED_RANKS)):
        planes = shrink(x, first, ranks, plan, drop_x, R=R)
        return expand(planes, second, y, scale, ranks, plan, R, M, sites, drop_x, drop_y)
    v = x.new_empty(T, num_ranks)
    if len(tiles):
        _shrink_expand_kernel[(len(tiles),)](
            x, first, second, v, y, tiles, plan.segments, scale, ranks, sites, drop_x, drop_y,
            first.stride(0), second.stride(0), K, y.shape[1], R, M, **config,
        )  # fmt: skip
    return v


def empty_planes(number: int, T: int, V: int, device: torch.device) -> Tensor:
    """[planes, T, V] fp32. Strides are multiples of 16 whatever T is, or Triton would compile again for another T."""
    return torch.empty(number, T + -T % 16, V, dtype=torch.float32, device=device)[:, :T]


def shrink(
    x: Tensor, first: Tensor, ranks: Tensor | None, plan: Plan, drop: Tensor | None = None,
    planes: Tensor | None = None, column: int = 0, R: int | None = None,
) -> Tensor:  # fmt: skip
    """planes[p, t] = first_u x[t] over the p-th plane of columns: [planes, T, M * R] fp32, allocated if not given.

    Args:
        planes, column: where to write: columns column .. column + M * R - 1 of these [planes', T, V]; planes past this
                        input's own are set to 0.
        R:              rank rows of one site, if first has several sites.
    """
    (T, K), num_ranks = x.shape, first.shape[1]
    assert x.is_contiguous()
    own = num_planes(K)
    if planes is None:
        planes = empty_planes(own, T, num_ranks, x.device)
    planes[own:, :, column : column + num_ranks] = 0.0
    R = R or num_ranks
    config = configuration(num_ranks, x.itemsize)
    tiles = plan.tiles[config["BLOCK_T"]]
    if len(tiles):
        _shrink_kernel[(len(tiles), own)](
            x, first, planes[:, :, column:], tiles, plan.segments, ranks, drop, first.stride(0), first.stride(1),
            planes.stride(0), planes.shape[2], K, R, num_ranks // R, **config,
        )  # fmt: skip
    return planes


def expand(
    planes: Tensor, second: Tensor, y: Tensor | None, scale: Tensor, ranks: Tensor | None, plan: Plan, R: int, M: int,
    sites: Tensor | None = None, drop_x: Tensor | None = None, drop_y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """v = s_u times the planes' sum, which is returned; y[t] = second_u^T v[t], written into y, if there is one."""
    number, T, num_ranks = planes.shape
    assert y is None or y.is_contiguous()
    v, N = second.new_empty(T, num_ranks), 0 if y is None else y.shape[1]
    config = configuration(num_ranks, second.itemsize)
    tiles = plan.tiles[config["BLOCK_T"]]
    if len(tiles):
        _expand_kernel[(len(tiles), max(1, -(-N // config["BLOCK"])))](
            planes, second, v, y, tiles, plan.segments, scale, ranks, sites, drop_x, drop_y,
            second.stride(0), planes.stride(0), number, N, R, M, **config,
        )  # fmt: skip
    return v
