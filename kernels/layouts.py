"""What a kernel takes for granted about memory, checked before it is launched.

A kernel gets a pointer and, for a bank, the stride between slots. That the numbers of one slot lie side by side, and
those of a table too, it takes for granted: were it otherwise it would read its neighbours' numbers and not know. Plain
PyTorch reads any layout and is held to the same rules, so what runs on a CPU runs on a GPU. The checks look at shapes,
strides and dtypes alone, so none of them waits for a device.
"""

from torch import Size, Tensor, dtype


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
