"""Prefix tuning: learned keys and values that every row attends to (Li & Liang 2021, arXiv:2101.00190, section 4).

    equation      softmax(q [P_k; k]^T) [P_v; v] in every attention; the text's positions begin after the prefix
    trained       P_k and P_v [V, H_kv * D] per attention: on a T5 the encoder's, the decoder's and cross-attention.
                  With hf_compat what Hugging Face PEFT reaches there: the decoder's own only
                  With `hidden` E [V, width], W1, b1, W2, b2 instead, and P = W2 tanh(W1 E + b1) + b2 (section 4.3)
    start         normal with deviation 0.02; with `hidden` E normal and the maps as PyTorch starts linear maps. The
                  base's output changes: attention to a prefix takes from the text's share
    numbers       2 * V * H_kv * D per attention
    cost          V more rows for every sequence. They run through the base like others, and their keys and values are
                  put in place of its own, so that every attention, cache and position needs no case of its own
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from minipeft.bank import Bank
from minipeft.errors import InputError
from minipeft.methods.method import Actor, Derived, Draw, Method, vectors
from minipeft.methods.prompt import check_tokens
from minipeft.models.hooks import Sites
from minipeft.models.t5 import T5


@dataclass(frozen=True)
class PrefixTuning(Method):
    """One user's prefix tuning.

    tokens: V. hidden: width of the MLP that prefixes are computed by in training; 0: none. hf_compat: see above.
    """

    name: ClassVar[str] = "prefix"
    summary: ClassVar[str] = "keys and values before the text, in every attention"

    tokens: int = 20
    hidden: int = 0
    hf_compat: bool = False

    def check(self, base: Sites) -> None:
        check_tokens(self.name, self.tokens, base)
        if self.hf_compat and not isinstance(base, T5):
            raise InputError("prefix: hf_compat is for a T5, where Hugging Face PEFT reaches the decoder only; leave "
                             "it out here: both reach every attention of this base")
        if self.hidden < 0:
            raise InputError(f"prefix: hidden is {self.hidden}; needed a width, or 0 for no MLP")

    def virtual(self, base: Sites) -> tuple[int, int]:
        if not isinstance(base, T5):
            return self.tokens, 0
        return self.tokens, 0 if self.hf_compat else self.tokens

    def prefixes(self, base: Sites) -> dict[str, int]:
        """"<attention>.k" and ".v" -> numbers of a virtual token there, in forward order."""
        sites = {site: H * D for site, (H, D) in base.attentions.items()}
        if isinstance(base, T5) and self.hf_compat:
            own = [site for site in sites if site.startswith("decoder.") and site.endswith(".attn")]
            sites = {site: sites[site] for site in own}
        return {f"{site}.{name}": width for site, width in sites.items() for name in ("k", "v")}

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        prefixes, width = self.prefixes(base), base.embed.weight.shape[1]
        if not self.hidden:
            return {name: (self.tokens, size) for name, size in prefixes.items()}
        total = sum(prefixes.values())
        return {"embedding": (self.tokens, width), "W1": (self.hidden, width), "b1": (self.hidden,),
                "W2": (total, self.hidden), "b2": (total,)}  # fmt: skip

    def flops(self, base: Sites) -> int:
        return 0

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        tensors = {}
        for name, shape in self.shapes(base).items():
            if name in ("W1", "b1", "W2", "b2"):
                bound = 1 / np.sqrt(base.embed.weight.shape[1] if name in ("W1", "b1") else self.hidden)
                numbers = draw(name).uniform(-bound, bound, shape)
            else:
                numbers = draw(name).standard_normal(shape) * (1.0 if name == "embedding" else 0.02)
            tensors[name] = torch.from_numpy(numbers).float()
        return tensors

    def computed(self, trained: dict[str, Tensor], base: Sites) -> dict[str, Tensor]:
        """The prefixes [S, V, width there] by name, from trained parameters [S, ...]."""
        if not self.hidden:
            return trained
        h = torch.baddbmm(trained["b1"][:, None], trained["embedding"], trained["W1"].transpose(1, 2)).tanh()
        P = torch.baddbmm(trained["b2"][:, None], h, trained["W2"].transpose(1, 2))  # [S, V, all widths]
        prefixes = self.prefixes(base)
        return dict(zip(prefixes, P.split(list(prefixes.values()), dim=-1)))

    def actor(self, bank: Bank, base: Sites) -> Actor:
        actor, prefixes = Actor(), self.prefixes(base)
        if not self.hidden:
            actor.prompts = {name: vectors(bank, name) for name in prefixes}
            return actor
        made = Derived(bank, tuple(self.shapes(base)), {name: (self.tokens, size) for name, size in prefixes.items()},
                       lambda trained, slots: self.computed(trained, base))  # fmt: skip
        actor.derived.append(made)
        actor.prompts = {name: made[name] for name in prefixes}
        return actor
