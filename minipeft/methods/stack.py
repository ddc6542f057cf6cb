"""Several methods at once in one user's row: LoRA and a head of their own, say.

Each part acts at its own places with its own parameters; the row holds them one after another.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minipeft.bank import Bank
from minipeft.errors import InputError
from minipeft.methods.method import Actor, Draw, Method, method_from
from minipeft.models.hooks import Sites


@dataclass(frozen=True)
class Stack(Method):
    """Methods that one user trains together."""

    name: ClassVar[str] = "stack"
    summary: ClassVar[str] = "several methods at once"

    members: tuple[Method, ...] = ()

    @property
    def parts(self) -> tuple[Method, ...]:
        return self.members

    def check(self, base: Sites) -> None:
        if not self.members or any(isinstance(part, Stack) for part in self.members):
            raise InputError("a stack holds one or more methods, and no stack")
        for part in self.members:
            part.check(base)
        names = [name for part in self.members for name in part.shapes(base)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"two methods of one user act at {twice[0]}; a place takes one of them")
        if sum(any(part.virtual(base)) for part in self.members) > 1:
            raise InputError("two methods of one user have virtual tokens; take one of them")

    def kind(self, base: Sites) -> tuple:
        return tuple(part.kind(base) for part in self.members)

    def virtual(self, base: Sites) -> tuple[int, int]:
        return max((part.virtual(base) for part in self.members), key=sum)

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        return {name: shape for part in self.members for name, shape in part.shapes(base).items()}

    def count(self, base: Sites) -> int:
        return sum(part.count(base) for part in self.members)

    def flops(self, base: Sites) -> int:
        return sum(part.flops(base) for part in self.members)

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        return {name: tensor for part in self.members
                for name, tensor in part.start(base, lambda *purpose, own=part: draw(own.name, *purpose)).items()}

    def tensors(self, row: Tensor, base: Sites) -> dict[str, Tensor]:
        return {name: tensor for part, own in self._rows(row, base) for name, tensor in part.tensors(own, base).items()}

    def row(self, tensors: dict[str, Tensor], base: Sites) -> Tensor:
        row = torch.zeros(self.layout(base).row_size)
        self.check_tensors(tensors, self.tensors(row, base))
        for part, own in self._rows(row, base):
            own.copy_(part.row({name: tensors[name] for name in part.tensors(own, base)}, base))
        return row

    def _rows(self, row: Tensor, base: Sites) -> list[tuple[Method, Tensor]]:
        """Each part's own stretch of the row."""
        return list(zip(self.members, row.split([part.layout(base).row_size for part in self.members])))

    def actors(self, bank: Bank, base: Sites) -> tuple[Actor, ...]:
        return tuple(part.actor(bank, base) for part in self.members)

    def described(self) -> dict:
        return {"name": self.name, "members": [part.described() for part in self.members]}

    @classmethod
    def from_described(cls, values: dict) -> "Stack":
        return cls(tuple(method_from(part) for part in values["members"]))
