"""P-tuning: virtual tokens before the text, written by a small encoder (Liu et al. 2021, arXiv:2103.10385).

    equation      P = MLP(bi-LSTM(E)), or MLP(E); [P; text] as in prompt tuning
    trained       E [V, width] and the encoder, one per user; on a T5 before the encoder's input
    start         as Hugging Face PEFT: E normal, LSTM uniform in +-1/sqrt(hidden), linear maps in +-1/sqrt(inputs). The
                  base's output changes, as the paper's does
    numbers       V * width + the encoder's: 1,593,344 at width 768, V 20, hidden 128, 2 layers of LSTM
    cost          V more rows for every sequence; the encoder runs once per pass and user, for all users at once

What the model needs in the end is P alone: V * width numbers. The encoder is kept in our own files so that training can
go on.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from minipeft.bank import Bank
from minipeft.errors import InputError
from minipeft.methods.method import Actor, Derived, Draw, Method
from minipeft.methods.prompt import check_tokens, virtual_at_input
from minipeft.models.hooks import Sites

ENCODERS = ("lstm", "mlp")
MAX_LAYERS = 64  # nobody needs as many, and their names alone would fill a memory
LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass(frozen=True)
class PTuning(Method):
    """One user's P-tuning. tokens: V. hidden: width of the encoder. layers: of the LSTM, each in both directions."""

    name: ClassVar[str] = "ptuning"
    summary: ClassVar[str] = "virtual tokens before the text and the encoder that writes them"

    tokens: int = 20
    encoder: str = "lstm"
    hidden: int = 128
    layers: int = 2

    def check(self, base: Sites) -> None:
        check_tokens(self.name, self.tokens, base)
        if self.encoder not in ENCODERS:
            raise InputError(f"ptuning: encoder {self.encoder!r} is unknown; choose one of {', '.join(ENCODERS)}")
        if self.encoder == "mlp" and self.layers != type(self).layers:
            raise InputError(f"ptuning: layers is {self.layers}, but those are of the LSTM; leave it out with an MLP")
        if self.hidden < 1 or not 1 <= self.layers <= MAX_LAYERS:
            raise InputError(f"ptuning: hidden is {self.hidden} and layers {self.layers}; both must be at least 1, and "
                             f"layers at most {MAX_LAYERS}")  # fmt: skip

    def virtual(self, base: Sites) -> tuple[int, int]:
        return virtual_at_input(self.tokens, base)

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        """Named as torch.nn.LSTM names its own: gates i, f, g, o one below the other; "_r": right to left."""
        H, width = self.hidden, base.embed.weight.shape[1]
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.tokens, width)}
        if self.encoder == "mlp":
            sizes = (width, H, H, width)
        else:
            for layer in range(self.layers):
                for end in (f"l{layer}", f"l{layer}_r"):
                    shapes |= {f"weight_ih_{end}": (4 * H, width if layer == 0 else 2 * H),
                               f"weight_hh_{end}": (4 * H, H), f"bias_ih_{end}": (4 * H,), f"bias_hh_{end}": (4 * H,)}
            sizes = (2 * H, 2 * H, width)
        for i, (K, N) in enumerate(pairwise(sizes)):
            shapes |= {f"mlp.{i}.weight": (N, K), f"mlp.{i}.bias": (N,)}
        return shapes

    def flops(self, base: Sites) -> int:
        return 0

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        shapes, tensors = self.shapes(base), {}
        for name, shape in shapes.items():
            if name == "embedding":
                numbers = draw(name).standard_normal(shape)
            else:
                inputs = shapes[name.replace("bias", "weight")][1] if name.startswith("mlp") else self.hidden
                numbers = draw(name).uniform(-1, 1, shape) / np.sqrt(inputs)
            tensors[name] = torch.from_numpy(numbers).float()
        return tensors

    def computed(self, trained: dict[str, Tensor]) -> Tensor:
        """P [S, V, width] from trained parameters [S, ...]."""
        x = trained["embedding"]  # [S, V, width]
        if self.encoder == "lstm":
            for layer in range(self.layers):
                weights = lambda end: [trained[f"{name}_l{layer}{end}"] for name in LSTM]  # noqa: B023, E731
                x = torch.cat([_lstm(x, *weights("")), _lstm(x.flip(1), *weights("_r")).flip(1)], -1)
        maps = 3 if self.encoder == "mlp" else 2
        for i in range(maps):
            x = torch.baddbmm(trained[f"mlp.{i}.bias"][:, None], x, trained[f"mlp.{i}.weight"].transpose(1, 2))
            x = x if i == maps - 1 else x.relu()
        return x

    def actor(self, bank: Bank, base: Sites) -> Actor:
        actor, shape = Actor(), (self.tokens, base.embed.weight.shape[1])
        made = Derived(bank, tuple(self.shapes(base)), {"prompt": shape},
                       lambda trained, slots: {"prompt": self.computed(trained)})  # fmt: skip
        actor.derived.append(made)
        actor.prompts["embed"] = made["prompt"]
        return actor


def _lstm(x: Tensor, W_ih: Tensor, W_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """One direction of an LSTM layer, each user's own: x [S, V, K] -> [S, V, H] (Hochreiter & Schmidhuber 1997).

    i, f, o = sigmoid, g = tanh of W_ih x + b_ih + W_hh h + b_hh;  c = f c + i g;  h = o tanh(c).
    """
    from_x = torch.baddbmm((b_ih + b_hh)[:, None], x, W_ih.transpose(1, 2))  # [S, V, 4 H]
    h = c = x.new_zeros(len(x), W_hh.shape[2])
    hs = []
    for step in from_x.unbind(1):
        gates = torch.baddbmm(step[:, None], h[:, None], W_hh.transpose(1, 2))[:, 0]
        i, f, g, o = gates.chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        hs.append(h)
    return torch.stack(hs, 1)
