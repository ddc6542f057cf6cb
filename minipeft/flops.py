"""Floating-point operations, counted by PyTorch's counter, and with them what that leaves out.

It knows matrix products and attention by name, 2 operations for a multiplication and the addition after it; but neither
products that are added in place nor attention as a CPU runs it. What Triton kernels do it does not see.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _product(y: Sequence[int], a: Sequence[int], b: Sequence[int], **_) -> int:
    """y += a b, of these shapes."""
    return 2 * prod(a) * b[-1]


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_, **__) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_, **__) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


LEFT_OUT = {
    aten.addmm_: _product, aten.baddbmm_: _product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}  # fmt: skip


def counter() -> FlopCounterMode:
    """A context: what runs in it is counted, by this thread; then `get_total_flops()`."""
    return FlopCounterMode(display=False, custom_mapping=LEFT_OUT)
