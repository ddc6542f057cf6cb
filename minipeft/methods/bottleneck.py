"""Bottleneck adapters: a small network in the stream, down to a few features, an activation and up again.

    equation      y + Wu act(Wd h + bd) + bu         y is what a block adds to the stream
                  Houlsby:  h = y, after attention and after the MLP            Houlsby et al. 2019 (arXiv:1902.00751)
                  Pfeiffer: h = x + y, normalised where the base does so then,
                            after the MLP                                       Pfeiffer et al. 2021 (arXiv:2005.00247)
                  parallel: y + s (...), h what the MLP itself reads            He et al. 2022 (arXiv:2110.04366)
    trained       Wd [F, width], bd [F], Wu [width, F] and bu [width] per adapter, F = width / reduction
    start         Wd normal with deviation 0.02, the others zero: the base's output is unchanged
    numbers       (2 * F + 1) * width + F per adapter
    cost          4 * F * width FLOPs per row and adapter forward, three times that with backward
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minipeft.bank import Bank
from minipeft.errors import InputError
from minipeft.methods.method import Actor, Bottlenecks, Draw, Method, choose, vectors
from minipeft.models.hooks import Sites
from minipeft_kernels.activations import ACTIVATIONS
from minipeft_kernels.bottleneck import MAX_F, BottleneckTensors


@dataclass(frozen=True)
class BottleneckMethod(Method):
    """What the three have in common.

    reduction:  the stream's width over the adapter's. activation: one of minipeft_kernels.activations.
    blocks:     after which blocks: last words of their names, as sites are named.
    """

    reads: ClassVar[str]  # see method.Bottlenecks

    reduction: float = 16
    activation: str = "relu"
    blocks: tuple[str, ...] = ("attn", "mlp")
    scale: float = 1.0

    def check(self, base: Sites) -> None:
        if self.activation not in ACTIVATIONS:
            raise InputError(f"{self.name}: activation {self.activation!r} is unknown; choose one of "
                             f"{', '.join(ACTIVATIONS)}")  # fmt: skip
        if not (math.isfinite(self.reduction) and self.reduction >= 1 and math.isfinite(self.scale)):
            raise InputError(f"{self.name}: reduction is {self.reduction} and scale {self.scale}; needed at least 1 "
                             "and a number")  # fmt: skip
        for site, width in self.chosen(base).items():
            if not 1 <= self.width(width) <= MAX_F:
                raise InputError(f"{self.name}: reduction {self.reduction} makes {self.width(width)} features of "
                                 f"{width} at {site}; needed 1 to {MAX_F}")  # fmt: skip

    def chosen(self, base: Sites) -> dict[str, int]:
        return choose(self.name, self.blocks, base.blocks)

    def width(self, width: int) -> int:
        """F of a stream this wide."""
        return int(width // self.reduction)

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        """For every block "<site>.down" [F', width], "<site>.up" [F', width], which is Wu transposed, and the biases.

        F' is F as a multiple of 8: on a CPU the last bits of narrower products depend on the company. Ops leave rows
        past F out, whatever they hold.
        """
        return {name: self._padded(name, shape) for name, shape in self.trained(base).items()}

    def trained(self, base: Sites) -> dict[str, tuple[int, ...]]:
        """The same without the padding."""
        shapes = {}
        for site, width in self.chosen(base).items():
            F = self.width(width)
            shapes |= {f"{site}.down": (F, width), f"{site}.down_bias": (F,),
                       f"{site}.up": (F, width), f"{site}.up_bias": (width,)}  # fmt: skip
        return shapes

    def _padded(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if name.endswith("up_bias") else (-(-shape[0] // 8) * 8, *shape[1:])

    def count(self, base: Sites) -> int:
        return sum(math.prod(shape) for shape in self.trained(base).values())

    def flops(self, base: Sites) -> int:
        return sum(4 * self.width(width) * width for width in self.chosen(base).values())

    def tensors(self, row: Tensor, base: Sites) -> dict[str, Tensor]:
        padded = super().tensors(row, base)
        return {name: padded[name][: shape[0]].contiguous() for name, shape in self.trained(base).items()}

    def row(self, tensors: dict[str, Tensor], base: Sites) -> Tensor:
        row = torch.zeros(self.layout(base).row_size)
        self.check_tensors(tensors, self.tensors(row, base))
        for name, part in self.layout(base).tensors(row).items():
            part[: len(tensors[name])] = tensors[name]
        return row

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        tensors = {name: torch.zeros(shape) for name, shape in self.trained(base).items()}
        for site in self.chosen(base):
            down = tensors[f"{site}.down"]
            down.copy_(torch.from_numpy(0.02 * draw(site).standard_normal(tuple(down.shape))))
        return tensors

    def actor(self, bank: Bank, base: Sites) -> Actor:
        actor = Actor()
        U, device = len(bank.weights), bank.weights.device
        scale = None if self.scale == 1 else torch.full((U,), self.scale, device=device)
        for site, width in self.chosen(base).items():
            F = self.width(width)
            widths = torch.full((U,), F, dtype=torch.int32, device=device) if F % 8 else None
            parts = [vectors(bank, f"{site}.{name}") for name in ("down", "down_bias", "up", "up_bias")]
            weights, grads = (BottleneckTensors(*tensors) for tensors in zip(*parts))
            actor.bottlenecks[site] = Bottlenecks(weights, grads, self.activation, self.reads, scale,
                                                   widths)  # fmt: skip
        return actor


@dataclass(frozen=True)
class Houlsby(BottleneckMethod):
    """One user's Houlsby adapters: two per layer. On a T5 none at cross-attention, as in PEFT-U."""

    name: ClassVar[str] = "houlsby"
    summary: ClassVar[str] = "bottlenecks after attention and MLP"
    reads: ClassVar[str] = "output"


@dataclass(frozen=True)
class Pfeiffer(BottleneckMethod):
    """One user's Pfeiffer adapters: one per layer."""

    name: ClassVar[str] = "pfeiffer"
    summary: ClassVar[str] = "a bottleneck after the MLP"
    reads: ClassVar[str] = "sum"

    blocks: tuple[str, ...] = ("mlp",)


@dataclass(frozen=True)
class Parallel(BottleneckMethod):
    """One user's parallel adapters: one beside each MLP; scale is He et al.'s s."""

    name: ClassVar[str] = "parallel"
    summary: ClassVar[str] = "a bottleneck beside the MLP"
    reads: ClassVar[str] = "input"

    blocks: tuple[str, ...] = ("mlp",)
    scale: float = 4.0
