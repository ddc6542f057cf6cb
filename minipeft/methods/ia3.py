"""IA3: rescaling what the base computes, feature by feature (Liu et al. 2022, arXiv:2205.05638, section 3.3).

    equation      y = l * (W x + b)         at keys and values
                  y = W (l * x) + b         at the map out of the MLP: its inner activations
    trained       l: [N] at the former, [K] at the latter
    start         one: the base's output is unchanged
    numbers       N, or K, per site
    cost          one multiplication per number rescaled
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minipeft.bank import Bank
from minipeft.errors import InputError
from minipeft.methods.method import Actor, Draw, IfThere, Method, choose, picks, vectors
from minipeft.models.hooks import Sites


@dataclass(frozen=True)
class IA3(Method):
    """One user's IA3 configuration.

    sites:  where it acts. inputs: those of them at which it rescales what goes in, not what comes out; the default is
            for those that are among the sites.
    """

    name: ClassVar[str] = "ia3"
    summary: ClassVar[str] = "vectors that rescale keys, values and inner activations"

    sites: tuple[str, ...] = IfThere(("k", "v", "down"))
    inputs: tuple[str, ...] = ("down",)

    def check(self, base: Sites) -> None:
        for name in self.inputs if self.inputs != type(self).inputs else ():
            if not any(picks(name, site) for site in self.chosen(base)):
                raise InputError(f"IA3: {name!r} among inputs is none of its sites {', '.join(self.sites)}; "
                                 "add it there")

    def chosen(self, base: Sites) -> dict[str, tuple[int, int]]:
        return choose("IA3", self.sites, base.sites)

    def at_input(self, site: str) -> bool:
        return any(picks(name, site) for name in self.inputs)

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        return {f"{site}.l": (K if self.at_input(site) else N,) for site, (K, N) in self.chosen(base).items()}

    def flops(self, base: Sites) -> int:
        return self.count(base)

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        return {name: torch.ones(shape) for name, shape in self.shapes(base).items()}

    def actor(self, bank: Bank, base: Sites) -> Actor:
        actor = Actor()
        for site in self.chosen(base):
            table = actor.input_scales if self.at_input(site) else actor.scales
            table[site] = vectors(bank, f"{site}.l")
        return actor
