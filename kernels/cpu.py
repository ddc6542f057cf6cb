"""The CPU path: batched products over tiles of one slot each, the same tiles the GPU kernels use.

A tile holds `tile` rows of one slot, so x as [n, tile, K] and the slots' matrices gathered as [n, R, K] turn every
family of the LoRA op into one `bmm`:

    shrink   v^T = scale * A x^T        [n, R, tile]     (rank first: twice as fast as x A^T on two cores)
    expand   y   = (v^T)^T Bt           [n, tile, N]
    wgrad    G   = v^T x                [n, R, K], then the tiles of a segment are summed in order

Sums run over K, over the rows of one tile, and over the tiles of one segment in order: never across users, and never
in an order that the company decides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels.segments import Segments


def tile_matrices(matrices: Tensor, segments: Segments, ranks: Tensor | None) -> Tensor:
    """[U, R, K] -> [n, R, K], each tile's own matrix; rows at or past the slot's rank become 0, whatever they hold."""
    gathered = matrices.index_select(0, segments.tile_slots)
    if ranks is not None:
        unused = torch.arange(matrices.shape[1], device=matrices.device) >= ranks[segments.tile_slots, None]  # [n, R]
        gathered = gathered.masked_fill_(unused[:, :, None], 0.0)
    return gathered


def shrink(x: Tensor, A: Tensor, scale: Tensor) -> Tensor:
    """x [n, tile, K], A [n, R, K], scale [n] -> v^T [n, R, tile] = scale * A x^T."""
    return torch.bmm(A, x.transpose(1, 2)).mul_(scale[:, None, None])


def expand_add_(y: Tensor, v: Tensor, Bt: Tensor) -> Tensor:
    """y [n, tile, N] += v Bt, with v given as v^T [n, R, tile] and Bt [n, R, N]. In place where y allows it."""
    return y.baddbmm_(v.transpose(1, 2), Bt)


def wgrad(v: Tensor, x: Tensor, segments: Segments) -> Tensor:
    """G[s] = sum of v^T x over the tiles of segment s in order: [S', R, K] for the S' segments that have rows."""
    partial = torch.bmm(v, x)  # [n, R, K]
    if len(partial) == len(segments.first_tile):
        return partial  # every segment is one tile
    flat = partial.view(len(partial), -1)
    tiles = torch.arange(len(flat), device=flat.device)
    return F.embedding_bag(tiles, flat, segments.first_tile, mode="sum").view(-1, *partial.shape[1:])


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tile: int) -> Tensor:
    """y = x W^T + b computed in fixed tiles of rows, so a row's bits do not depend on how many rows share the product.

    Args:
        x: [T, K], T a multiple of tile. weight: [N, K]. bias: [N] or None.
    """
    T, K = x.shape
    tiles = x.view(T // tile, tile, K)
    y = torch.bmm(tiles, weight.t().expand(T // tile, K, -1)).view(T, -1)
    return y if bias is None else y.add_(bias)
