"""DoRA: LoRA for the direction of every output's weights, a trained number for their length (arXiv:2402.09353).

    equation      y = g * (W x + s B A x) + b       g = m / |W + s B A|, the length of each row      eq. 5
    trained       A [rank, K], B [N, rank] and m [N] at every chosen site
    start         LoRA's, and m = |W|: g is one and the base's output is unchanged
    numbers       rank * (K + N) + N per site
    cost          LoRA's and N multiplications per row and site, and per pass and user about 2 * rank * K * N FLOPs per
                  site for the lengths

As the paper proposes (section 4.3) and Hugging Face PEFT does, no gradient passes through the length. It is
|W|^2 + 2 s sum(B * (W A^T)) + s^2 sum((B A A^T) * B) for each row, for all users at once; W + s B A is never formed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minipeft.bank import Bank
from minipeft.errors import InputError
from minipeft.methods.lora import LoRA, LoraActor
from minipeft.methods.method import Derived, Draw
from minipeft.models.hooks import Sites


@dataclass(frozen=True)
class DoRA(LoRA):
    """One user's DoRA configuration: LoRA's options."""

    name: ClassVar[str] = "dora"
    summary: ClassVar[str] = "LoRA, and the length of every output's weights"

    def check(self, base: Sites) -> None:
        super().check(base)
        if self.chosen(base).keys() & base.embeddings.keys():
            raise InputError("DoRA acts at linear maps, not at the embedding; use LoRA there")

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        return super().shapes(base) | {f"{site}.m": (N,) for site, (_, N) in self.chosen(base).items()}

    def count(self, base: Sites) -> int:
        return super().count(base) + sum(N for _, N in self.chosen(base).values())

    def flops(self, base: Sites) -> int:
        return super().flops(base) + sum(N for _, N in self.chosen(base).values())

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        weights = {site: base.linears[site].weight.detach().float() for site in self.chosen(base)}
        return super().start(base, draw) | {f"{site}.m": W.norm(dim=1).cpu() for site, W in weights.items()}

    def actor(self, bank: Bank, base: Sites) -> "DoraActor":
        return DoraActor(self, bank, base)


class DoraActor(LoraActor):
    """LoRA, then y = g * y + (1 - g) b, where y has the bias already."""

    def __init__(self, method: DoRA, bank: Bank, base: Sites):
        super().__init__(method, bank, base)
        for site, (_, N) in method.chosen(base).items():
            linear, shapes = base.linears[site], {"g": (N,)}
            if linear.bias is not None:
                shapes["shift"] = (N,)
            made = Derived(bank, (f"{site}.A", f"{site}.Bt", f"{site}.m"), shapes, self._lengths_of(site, linear))
            self.derived.append(made)
            self.scales[site] = made["g"]
            if linear.bias is not None:
                self.shifts[site] = made["shift"]

    def _lengths_of(self, site: str, linear):
        fp32 = lambda: linear.weight.detach().float()  # noqa: E731  of a bf16 base a copy, kept no longer than needed
        squares, scale = fp32().square().sum(1), self.settings[site][0]

        def gains(trained: dict[str, Tensor], slots: Tensor) -> dict[str, Tensor]:
            A, Bt, m = trained.values()  # [S, R, K], [S, R, N], [S, N]
            with torch.no_grad():
                s = scale.index_select(0, slots)[:, None]
                AW = torch.matmul(A, fp32().t())  # [S, R, N]
                BAA = torch.bmm(torch.bmm(A, A.transpose(1, 2)), Bt)  # [S, R, N]: A A^T is symmetric
                lengths = (squares + 2 * s * (Bt * AW).sum(1) + s * s * (Bt * BAA).sum(1)).clamp(min=0.0).sqrt()
            g = m / lengths
            return {"g": g} if linear.bias is None else {"g": g, "shift": (1 - g) * linear.bias.detach().float()}

        return gains
