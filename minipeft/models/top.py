"""A decoder's last layer, at the rows that are read alone.

    k, v                           of all rows: those that are read see them
    q, attention, o, MLP, norms    of the rows that are read: a prompt's last one or two

Below the last layer every row is needed, for its keys; of the last layer's other outputs nothing is read. So they are
not computed: exact, forward and backward, and of a base of L layers nearly one in L of its work is gone. Dropout on the
inputs of q, o and the MLP is drawn for the rows that are read, by themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from minipeft.models.attention import Packed
from minipeft.models.hooks import Hooks, Linear, together
from minipeft.models.rows import Rows


@dataclass(frozen=True)
class Top:
    """The rows that are read.

    index:  [n] int64, which rows of the pass; None: all.
    attend: attention of these rows to all; None where the base computes its last layer whole.
    hooks:  what happens to these rows, at the last layer's q and all sites after it, and at the head.
    """

    index: Tensor | None
    attend: Packed | None
    hooks: Hooks

    @staticmethod
    def all(rows: Rows, hooks: Hooks) -> "Top":
        """As every layer but the last one runs: all rows go on."""
        return Top(None, rows.attend, hooks)

    def of(self, x: Tensor) -> Tensor:
        """These rows of x [T, ...]."""
        return x if self.index is None else x.index_select(0, self.index)

    def qkv(self, linears: Sequence[Linear], x: Tensor, hooks: Hooks) -> tuple[Tensor, ...]:
        """q of these rows, k and v of all rows of x [T, K]. linears: those of q, k and v. hooks: of all rows."""
        if self.index is None:
            return together(linears, x, hooks)
        return linears[0](self.of(x), self.hooks), *together(linears[1:], x, hooks)
