"""The bank: one row of one buffer per resident user.

All trainable numbers of a user, of every site, lie in one row of `weights [U, P]`; gradients and AdamW's moments have
the same shape. So admitting, evicting, saving, clipping or zeroing a user is one operation on one row, and a site's
parameter for all users is a view [U, ...] with stride P between slots.
"""

import math

import torch
from torch import Tensor

SPAN = 64  # numbers; every parameter starts at a multiple of it within the row, so vector loads stay aligned


class Layout:
    """Where each parameter of a user lies in their row of P numbers.

    Args:
        shapes: parameter name -> its shape for one user.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes = dict(shapes)
        self.offsets, P = {}, 0
        for name, shape in self.shapes.items():
            self.offsets[name] = P
            P += -(-math.prod(shape) // SPAN) * SPAN
        self.row_size = P

    def view(self, rows: Tensor, name: str) -> Tensor:
        """Parameter `name` in rows [..., P]: [..., *shape], a view."""
        start, shape = self.offsets[name], self.shapes[name]
        return rows[..., start : start + math.prod(shape)].unflatten(-1, shape)

    def row(self, tensors: dict[str, Tensor]) -> Tensor:
        """One user's parameters by name -> their row [P], zeros between the spans."""
        if tensors.keys() != self.shapes.keys():
            raise ValueError(f"Layout.row: needs parameters {sorted(self.shapes)}, got {sorted(tensors)}.")
        row = torch.zeros(self.row_size)
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != self.shapes[name]:
                raise ValueError(f"Layout.row: {name} must be {self.shapes[name]}, got {tuple(tensor.shape)}.")
            self.view(row, name).copy_(tensor)
        return row

    def tensors(self, row: Tensor) -> dict[str, Tensor]:
        """One row [P] -> the user's parameters by name. Undoes `row`; views, not copies."""
        return {name: self.view(row, name) for name in self.shapes}


class Bank:
    """Rows of numbers for up to U resident users of one method configuration.

    weights, grads, exp_avg, exp_avg_sq: [U, P] fp32. users: who has each slot, None where it is free.
    copy: [U, P] in the base's dtype if that is bf16, fp16 or fp64: the weights as ops take them, rounded after every
          step. None where the base computes in fp32. compute: what ops take, the copy or the weights themselves.
    """

    def __init__(
        self, layout: Layout, num_slots: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.layout = layout
        self.weights, self.grads, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(num_slots, layout.row_size, device=device) for _ in range(4)
        )
        self.copy = None if dtype == torch.float32 else torch.zeros_like(self.weights, dtype=dtype)
        self.compute = self.weights if self.copy is None else self.copy
        self.users: list[str | None] = [None] * num_slots

    def admit(self, user: str, row: Tensor) -> int:
        """Put a user's row into a free slot, with zero moments. Returns the slot.

        Raises:
            ValueError: the user is already resident, no slot is free, or the row is not [P].
        """
        if user in self.users:
            raise ValueError(f"Bank.admit: {user!r} already has slot {self.users.index(user)}.")
        if None not in self.users:
            raise ValueError(f"Bank.admit: all {len(self.users)} slots are taken; evict a user first.")
        if row.shape != (self.layout.row_size,):
            raise ValueError(f"Bank.admit: the row must have {self.layout.row_size} numbers, got {tuple(row.shape)}.")
        slot = self.users.index(None)
        self.users[slot] = user
        self.weights[slot] = row
        self.compute[slot] = self.weights[slot]
        for buffer in (self.grads, self.exp_avg, self.exp_avg_sq):
            buffer[slot] = 0.0
        return slot

    def evict(self, slot: int) -> None:
        """Free a slot. The numbers stay until the next user overwrites them."""
        if self.users[slot] is None:
            raise ValueError(f"Bank.evict: slot {slot} is already free.")
        self.users[slot] = None
