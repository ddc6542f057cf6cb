"""What a kernel takes for granted about memory, checked before it is launched.

A kernel gets a pointer and, for a bank, the stride between slots. That the numbers of one slot lie side by side, and
those of a table too, it takes for granted: were it otherwise it would read its neighbours' numbers and not know. Plain
PyTorch reads any layout and is held to the same rules, so what runs on a CPU runs on a GPU. The checks look at shapes,
strides and dtypes alone, so none of them waits for a device.
"""

import torch
from torch import Size, Tensor, dtype

from minipeft_kernels.backend import chosen

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of numbers, for the kernels; plain PyTorch takes fp64 too


def check_dtype(op: str, x: Tensor) -> None:
    """Raises ValueError unless x has a dtype that the implementation on its device takes."""
    name, dtypes = chosen(x.device, ("the kernels take", DTYPES), ("plain PyTorch takes", (*DTYPES, torch.float64)))
    if x.dtype not in dtypes:
        raise ValueError(f"{op}: x is {x.dtype}; {name} {', '.join(map(str, dtypes))}.")


def check_table(op: str, name: str, table: Tensor, shape: tuple[int, ...], *dtypes: dtype) -> None:
    """Raises ValueError unless table has this shape and one of these dtypes and is contiguous."""
    if table.shape != shape or table.dtype not in dtypes or not table.is_contiguous():
        raise ValueError(f"{op}: {name} is {tuple(table.shape)} {table.dtype} with strides {table.stride()}; needed is "
                         f"{shape} {' or '.join(str(one) for one in dtypes)}, contiguous. Convert it with .to() and "
                         ".contiguous().")


def check_slots(op: str, name: str, matrices: Tensor, shape: Size) -> None:
    """Raises ValueError unless matrices [U, ...] have this shape and each slot's numbers lie side by side."""
    if matrices.shape != shape or not (matrices.is_contiguous() or matrices[0].is_contiguous()):
        raise ValueError(f"{op}: {name} is {tuple(matrices.shape)} with strides {matrices.stride()}; needed is "
                         f"{tuple(shape)}, contiguous within a slot: only slots may be apart. Call .contiguous().")


def check_grads(op: str, name: str, grads: Tensor, shape: Size) -> None:
    """Raises ValueError unless backward can write grads [U, ...] there: as check_slots, and fp32 where kernels run."""
    check_slots(op, name, grads, shape)
    if grads.dtype not in chosen(grads.device, (torch.float32,), (*DTYPES, torch.float64)):
        raise ValueError(f"{op}: {name} is {grads.dtype}; gradients are summed and kept in torch.float32.")


def check_no_grad(op: str, name: str, table: Tensor) -> None:
    """Raises ValueError if autograd waits for a gradient of table, which nothing computes."""
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} requires grad but gets no gradient here; detach it.")
