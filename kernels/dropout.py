"""Dropout whose mask is a function of the user's own numbers: drawn again wherever it is needed, never stored.

    x'[t, k] = x[t, k] * keep[t, k] / (1 - p)           Srivastava et al. 2014; on a LoRA's input, Hu et al. 2021, 4.1

keep[t, k] is byte k mod 16 of philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with

    key      64 bits of the user, the step and the site (the caller's hash; one per segment)
    counter  (k // 16, position of row t in its segment, 0, 0)

so it depends on nothing a batch decides. A byte is kept if it is at least `threshold` = 256 p: p is a multiple of
1/256, and one call of the generator serves 16 numbers, which keeps drawing cheaper than reading them. At p = 1 nothing
is kept, and the branch gives 0.
"""

import numpy as np
import torch
from torch import Tensor

from minipeft_kernels.dtypes import jit, tl


@jit
def drop_key(drops_ptr, segment):
    """Of a segment's row in drops [S, 2] int64: (key, threshold, what kept numbers are multiplied with)."""
    key = tl.load(drops_ptr + 2 * segment)
    threshold = tl.load(drops_ptr + 2 * segment + 1).to(tl.int32)
    return key, threshold, 256.0 / tl.maximum(256 - threshold, 1).to(tl.float32)  # of nothing kept: any but inf


@jit
def keep_block(key, threshold, positions, first_col, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """keep of these rows and columns first_col .. first_col + BLOCK - 1 (multiples of 16): [BLOCK_T, BLOCK] bool."""
    zero = tl.zeros((BLOCK_T, BLOCK // 16), tl.int32)
    sixteenths = first_col // 16 + tl.arange(0, BLOCK // 16)
    w0, w1, w2, w3 = tl.philox(key, zero + sixteenths[None, :], zero + positions[:, None], zero, zero, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_T, BLOCK // 4)  # w0 w1 w2 w3 side by side
    octets = (words[:, :, None] >> (8 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]) & 255
    return octets.reshape(BLOCK_T, BLOCK).to(tl.int32) >= threshold


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for 32-bit numbers held in int64. The product wraps, its bits are right."""
    product = b * a
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def philox(key: Tensor, c0: Tensor, c1: Tensor) -> list[Tensor]:
    """Four 32-bit words (held in int64) of philox4x32-7 at counter (c0, c1, 0, 0). All int64, of one shape."""
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(7):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def keep_mask(drops: Tensor, starts: np.ndarray, width: int) -> tuple[Tensor, Tensor]:
    """keep [T, width] bool and 1 / (1 - p) [T, 1] fp32 of all rows: what the kernels draw block by block.

    Args:
        drops:  [S, 2] int64, key and threshold of each segment.
        starts: [S + 1] on the host.
    """
    lengths = torch.from_numpy(np.diff(starts)).to(drops.device)
    rows = torch.repeat_interleave(drops, lengths, dim=0)  # [T, 2]
    first = torch.repeat_interleave(torch.from_numpy(starts[:-1]).to(drops.device), lengths)
    positions = torch.arange(len(rows), device=drops.device) - first  # [T]
    sixteenths = torch.arange(-(-width // 16), device=drops.device)
    key, c0, c1 = torch.broadcast_tensors(rows[:, :1], sixteenths[None, :], positions[:, None])
    words = torch.stack(philox(key, c0, c1), -1)  # [T, width / 16, 4]
    octets = (words[..., None] >> (8 * torch.arange(4, device=drops.device))) & 255  # [T, width / 16, 4, 4]
    keep = octets.view(len(rows), -1)[:, :width] >= rows[:, 1:]
    return keep, 256.0 / (256 - rows[:, 1:]).clamp(min=1).float()
