"""A head of one's own: what a user thinks of a text that everybody's encoder reads alike.

On an encoder with classes (models/classifier.py):

    equation      logits = W h + b, h the text's vector
    trained       W [C, width] and b [C]
    start         zero: every class is as likely
    numbers       C * (width + 1)
    cost          2 * C * (width + 1) FLOPs per text

On a T5 (PEFT-U's personalised head): one encoder block of one's own after the base's last, before its final norm:

    equation      x = x + o(attention(q(n1 x), k(n1 x), v(n1 x)));  x = x + mlp(n2 x)
    trained       all matrices and norms of the block; the bias of positions is the base's
    start         as the base's last block, but o and down zero: the base's output is unchanged
    numbers       those of an encoder layer: 7,079,424 on a Flan-T5-base
    cost          2 FLOPs per number of the matrices and input token, 1 per number of the norms, and attention's own
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minipeft.bank import Bank
from minipeft.errors import InputError
from minipeft.methods.extra_block import ExtraBlock
from minipeft.methods.method import Actor, Draw, Method
from minipeft.models.hooks import Sites
from minipeft.models.t5 import T5


@dataclass(frozen=True)
class Head(Method):
    """One user's own head. It has no options: its size is the base's."""

    name: ClassVar[str] = "head"
    summary: ClassVar[str] = "a linear map from a text's vector to the labels; on a T5 one more encoder block"

    def check(self, base: Sites) -> None:
        if not isinstance(base, T5) and base.head_size is None:
            raise InputError(f"head: a {type(base).__name__} has no place for a head of one's own; it needs an encoder "
                             "with classes or a T5")

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        """ "head.W" [C', width + 1], C' the next power of two from 8 of C, its last column the bias."""
        if isinstance(base, T5):
            return ExtraBlock.shapes(base)
        K, C = base.head_size
        return {"head.W": (max(8, 1 << (C - 1).bit_length()), K)}

    def count(self, base: Sites) -> int:
        if isinstance(base, T5):
            return super().count(base)
        K, C = base.head_size
        return K * C

    def flops(self, base: Sites) -> int:
        if isinstance(base, T5):
            return ExtraBlock.flops(base)
        K, C = base.head_size
        return 2 * K * C

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        if isinstance(base, T5):
            return ExtraBlock.start(base)
        K, C = base.head_size
        return {"head.weight": torch.zeros(C, K - 1), "head.bias": torch.zeros(C)}

    def tensors(self, row: Tensor, base: Sites) -> dict[str, Tensor]:
        """"head.weight" [C, width] and "head.bias" [C]; on a T5 the block's parameters."""
        if isinstance(base, T5):
            return super().tensors(row, base)
        W = self.layout(base).view(row, "head.W")[: base.head_size[1]]
        return {"head.weight": W[:, :-1].contiguous(), "head.bias": W[:, -1].contiguous()}

    def row(self, tensors: dict[str, Tensor], base: Sites) -> Tensor:
        if isinstance(base, T5):
            return super().row(tensors, base)
        row = torch.zeros(self.layout(base).row_size)
        self.check_tensors(tensors, self.tensors(row, base))
        W = torch.cat([tensors["head.weight"], tensors["head.bias"][:, None]], 1)
        self.layout(base).view(row, "head.W")[: len(W)] = W
        return row

    def actor(self, bank: Bank, base: Sites) -> Actor:
        return ExtraBlock(bank, base) if isinstance(base, T5) else HeadActor(bank, base)


class HeadActor(Actor):
    """A user's head as a LoRA whose B is the identity: y = I W h. Nobody reads the identity's gradient."""

    def __init__(self, bank: Bank, base: Sites):
        super().__init__()
        W, grad_W = (bank.layout.view(numbers, "head.W") for numbers in (bank.compute, bank.grads))
        identity = torch.eye(W.shape[1], base.head_size[1], device=W.device, dtype=W.dtype).expand(len(W), -1, -1)
        unread = torch.empty(identity.shape, device=W.device)
        self.loras[("head",)] = {"A": W, "Bts": (identity,), "grad_A": grad_W, "grad_Bts": (unread,),
                                 "scale": torch.ones(len(W), device=W.device)}  # fmt: skip
