"""The CPU path: batched products over pieces of one slot each.

A piece (segments.py) holds some rows of one slot, so x as [n, size, K] and the slots' matrices gathered as [n, R, K]
turn every family of the LoRA op into one `bmm` for each size of pieces:

    shrink   v^T = scale * A x^T        [n, R, size]     (rank first: twice as fast as x A^T on two cores)
    expand   y   = (v^T)^T Bt           [n, size, N]
    wgrad    G   = v^T x                [n, R, K], then the pieces of a segment are summed in order

Sums run over K, over the rows of one piece, and over the pieces of one segment in order: never across users, and never
in an order that the company decides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels.segments import Pieces, Tiles, take


def tile_matrices(matrices: Tensor, slots: slice | Tensor, ranks: Tensor | None, M: int = 1) -> Tensor:
    """[U, M * R, K] -> [n, M * R, K], each tile's own; rows at or past the slot's rank become 0, whatever they hold."""
    mine = take(matrices, slots)
    if ranks is None:
        return mine
    of_site = torch.arange(matrices.shape[1], device=matrices.device) % (matrices.shape[1] // M)  # [M * R]
    unused = of_site >= take(ranks, slots)[:, None]  # [n, M * R]
    return mine.masked_fill(unused[:, :, None], 0.0)


def shrink(x: Tensor, A: Tensor, scale: Tensor) -> Tensor:
    """x [n, size, K], A [n, R, K], scale [n] -> v^T [n, R, size] = scale * A x^T."""
    return torch.bmm(A, x.transpose(1, 2)).mul_(scale[:, None, None])


def expand_rows_(y: Tensor, pieces: Pieces, v: Tensor, Bt: Tensor, beta: int) -> None:
    """The pieces' rows of y [T, N] = beta * what they were + v Bt. beta is 0 (whatever y holds) or 1.

    The same product, sum included, whether the rows follow one another or not: that depends on the company.
    """
    part = pieces.of(y)  # [n, size, N], of y itself if the rows follow one another
    part.baddbmm_(v.transpose(1, 2), Bt, beta=beta)
    if not isinstance(pieces.rows, slice):
        put_rows_(y, pieces, part)


def put_rows_(y: Tensor, pieces: Pieces, part: Tensor) -> None:
    """The pieces' rows of y [T, N] = part [n, size, N]."""
    if isinstance(pieces.rows, slice):
        pieces.of(y).copy_(part)
        return
    rows, part = pieces.rows, part.reshape(-1, y.shape[1])
    if pieces.filled is not None:
        places, rows, _ = pieces.filled
        part = part.index_select(0, places)
    y.index_copy_(0, rows, part)


def sum_pieces(partial: Tensor, tiles: Tiles) -> Tensor:
    """All pieces, in the plan's order, [p, R, K] -> each segment's pieces summed in row order: [S', R, K]."""
    if len(partial) == len(tiles.first_piece):
        return partial if len(tiles.pieces) == 1 else partial.index_select(0, tiles.order)
    flat = partial.view(len(partial), -1)
    return F.embedding_bag(tiles.order, flat, tiles.first_piece, mode="sum").view(-1, *partial.shape[1:])


def store_(grad: Tensor, own: Tensor, slots: Tensor, accumulate: Tensor | None) -> None:
    """grad[slots] = own [S', ...], or += own where accumulate [U] is not 0. What else grad holds is not read."""
    if accumulate is not None:
        later = accumulate.index_select(0, slots).bool().view(-1, *[1] * (own.ndim - 1))
        own = own + torch.where(later, grad[slots].to(own.dtype), 0.0)
    grad[slots] = own.to(grad.dtype)


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tile: int) -> Tensor:
    """y = x W^T + b computed in fixed tiles of rows, so a row's bits do not depend on how many rows share the product.

    Args:
        x: [T, K], T a multiple of tile. weight: [N, K]. bias: [N] or None.
    """
    T, K = x.shape
    tiles = x.view(T // tile, tile, K)
    y = torch.bmm(tiles, weight.t().expand(T // tile, K, -1)).view(T, -1)
    return y if bias is None else y.add_(bias)
