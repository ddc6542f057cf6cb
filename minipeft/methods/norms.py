"""LayerNorm tuning: norms of one's own (Zhao et al. 2024, arXiv:2312.11420).

    equation      y = w * normalised(x) + b         in place of the base's w and b; an RMSNorm has no b
    trained       w, b: [width] at every norm of the stream
    start         the base's own: its output is unchanged
    numbers       2 * width per LayerNorm, width per RMSNorm
    cost          one multiplication and one addition per number normalised
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minipeft.bank import Bank
from minipeft.methods.method import Actor, Draw, Method, choose, vectors
from minipeft.models.hooks import Sites


@dataclass(frozen=True)
class LayerNormTuning(Method):
    """One user's configuration of LayerNorm tuning. norms: names of norms, as sites are named; (): all."""

    name: ClassVar[str] = "layernorm"
    summary: ClassVar[str] = "weights and biases of the norms"

    norms: tuple[str, ...] = ()

    def check(self, base: Sites) -> None:
        self.chosen(base)

    def chosen(self, base: Sites) -> dict:
        return choose("layernorm", self.norms, base.norms) if self.norms else dict(base.norms)

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._own(base).items()}

    def _own(self, base: Sites) -> dict[str, Tensor]:
        """The base's own parameters."""
        named = {f"{site}.{kind}": getattr(norm, kind) for site, norm in self.chosen(base).items()
                 for kind in ("weight", "bias")}  # fmt: skip
        return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}

    def flops(self, base: Sites) -> int:
        return self.count(base)

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        return {name: tensor.float().cpu() for name, tensor in self._own(base).items()}

    def actor(self, bank: Bank, base: Sites) -> Actor:
        actor = Actor()
        for site, norm in self.chosen(base).items():
            actor.gains[site] = vectors(bank, f"{site}.weight")
            if norm.bias is not None:
                actor.shifts[site] = vectors(bank, f"{site}.bias")
        return actor
