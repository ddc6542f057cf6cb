"""BitFit: biases of one's own (Ben Zaken et al. 2022, arXiv:2106.10199).

    equation      y = W x + b         with b in place of the base's, at every linear map and norm that has one
    trained       b: [N]
    start         the base's own: its output is unchanged
    numbers       N per bias. A base without biases (Llama, T5) has nothing to train
    cost          one addition per number
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minipeft.bank import Bank
from minipeft.errors import InputError
from minipeft.methods.method import Actor, Derived, Draw, Method
from minipeft.models.hooks import Sites


@dataclass(frozen=True)
class BitFit(Method):
    """One user's biases. It has no options: it trains all that the base has."""

    name: ClassVar[str] = "bitfit"
    summary: ClassVar[str] = "the biases of linear maps and norms"

    def check(self, base: Sites) -> None:
        if not self._own(base):
            raise InputError(f"bitfit: this {type(base).__name__} has no biases, so nothing would be trained; choose "
                             "another method")  # fmt: skip

    def _own(self, base: Sites) -> dict[str, Tensor]:
        """The base's own biases, by site."""
        places = base.linears | base.norms
        return {site: place.bias.detach() for site, place in places.items() if place.bias is not None}

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        return {f"{site}.bias": tuple(bias.shape) for site, bias in self._own(base).items()}

    def flops(self, base: Sites) -> int:
        return self.count(base)

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        return {f"{site}.bias": bias.float().cpu() for site, bias in self._own(base).items()}

    def actor(self, bank: Bank, base: Sites) -> Actor:
        """The base adds its own bias with its product; what is added here is the difference."""
        actor, own = Actor(), {f"{site}.bias": bias for site, bias in self._own(base).items()}
        differences = Derived(bank, tuple(own), self.shapes(base),
                              lambda trained, slots: {name: bias - own[name].float() for name, bias in trained.items()})
        actor.derived.append(differences)
        actor.shifts = {name.removesuffix(".bias"): differences[name] for name in own}
        return actor
