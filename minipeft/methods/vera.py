"""VeRA: two vectors per site around random projections that all users and sites share (arXiv:2310.11454).

    equation      y = W x + b + d_b * (B (d * (A x)))       A [rank, K], B [N, rank] random and frozen       eq. 2
    trained       d [rank] and d_b [N] at every chosen site
    start         d = 0.1, d_b = 0: the base's output is unchanged
    numbers       rank + N per site
    cost          2 * rank * (K + N) + rank + N FLOPs per row and site; but A and B are read once for all users, and a
                  million of them cost (rank + N) numbers each

A and B are drawn once, as large as the largest site needs, by Hugging Face PEFT's recipe (Kaiming uniform, +-sqrt(6 /
inputs), from one generator, A first): each site takes their first columns and rows. The same seed gives PEFT's numbers.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minipeft.bank import Bank
from minipeft.errors import InputError
from minipeft.methods.method import Actor, Draw, IfThere, Method, Share, choose, vectors
from minipeft.models.hooks import Sites
from minipeft_kernels.ia3 import ia3_rows
from minipeft_kernels.lora_linear import lora_linear
from minipeft_kernels.segments import VectorRows

MOST_RANKS = 2**14  # the projections are drawn in full: more is a damaged file


@dataclass(frozen=True)
class VeRA(Method):
    """One user's VeRA configuration.

    rank: of the shared projections. seed: they are drawn from. d_start: start value of d.
    """

    name: ClassVar[str] = "vera"
    summary: ClassVar[str] = "two vectors around projections that all users share"

    rank: int = 256
    sites: tuple[str, ...] = IfThere(("q", "v"))
    seed: int = 0
    d_start: float = 0.1

    def check(self, base: Sites) -> None:
        if not 1 <= self.rank <= MOST_RANKS:
            raise InputError(f"VeRA rank must be 1 to {MOST_RANKS}, got {self.rank}")
        if not 0 <= self.seed < 2**63 or not math.isfinite(self.d_start):
            raise InputError(f"VeRA: seed is {self.seed} and d_start {self.d_start}; needed 0 to 2^63 - 1 and a number")
        self.chosen(base)

    def chosen(self, base: Sites) -> dict[str, tuple[int, int]]:
        return choose("VeRA", self.sites, base.sites)

    def kind(self, base: Sites) -> tuple:
        return self.name, self.rank, self.sites, self.seed  # not where d starts: projections are a bank's

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for site, (_, N) in self.chosen(base).items():
            shapes |= {f"{site}.d": (self.rank,), f"{site}.d_b": (N,)}
        return shapes

    def flops(self, base: Sites) -> int:
        return sum(2 * self.rank * (K + N) + self.rank + N for K, N in self.chosen(base).values())

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        return {name: torch.full(shape, self.d_start if name.endswith(".d") else 0.0)
                for name, shape in self.shapes(base).items()}  # fmt: skip

    def projections(self, base: Sites) -> tuple[Tensor, Tensor]:
        """A [rank, largest K] and B [largest N, rank], fp32, on the CPU."""
        Ks, Ns = zip(*self.chosen(base).values())
        generator = torch.Generator().manual_seed(self.seed)

        def draw(rows: int, cols: int) -> Tensor:
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(cols))  # sqrt(6 / cols), rounded as PEFT does
            return torch.empty(rows, cols).uniform_(-bound, bound, generator=generator)

        A = draw(self.rank, max(Ks))
        return A, draw(max(Ns), self.rank)

    def actor(self, bank: Bank, base: Sites) -> Actor:
        actor = Actor()
        A, B = (M.to(bank.compute.device, bank.compute.dtype) for M in self.projections(base))
        for site, (K, N) in self.chosen(base).items():
            actor.deltas[site] = _delta(A[:, :K].contiguous(), B[:N].contiguous(), *(
                vectors(bank, f"{site}.{name}") for name in ("d", "d_b")))  # fmt: skip
        return actor


def _delta(A: Tensor, B: Tensor, d, d_b):
    def delta(x: Tensor, share: Share) -> Tensor:
        """d_b * (B (d * (A x))) for a share's rows."""
        scale = lambda v, by: ia3_rows(  # noqa: E731
            v, share.anchor, [VectorRows(0, by.values, share.segments, by.grads)])  # fmt: skip
        frozen = lambda v, M: lora_linear(v, share.anchor, (M,), (None,), (), share.tile)[0]  # noqa: E731
        return scale(frozen(scale(frozen(x, A), d), B), d_b)

    return delta
