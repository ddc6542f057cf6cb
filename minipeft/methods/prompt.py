"""Prompt tuning: learned rows before every text (Lester et al. 2021, arXiv:2104.08691, section 2).

    equation      [P; E] in place of the embedded text E
    trained       P [V, width]; on a T5 before the encoder's input
    start         rows of the base's own embedding, of tokens drawn at random (the paper's "sampled vocabulary") or of a
                  text's tokens, repeated, times what the base multiplies them by (Gemma 2); or normal, as Hugging Face
                  PEFT. The base's output changes: the paper's does
    numbers       V * width
    cost          V more rows for every sequence
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from minipeft.bank import Bank
from minipeft.errors import InputError
from minipeft.methods.method import Actor, Draw, Method, vectors
from minipeft.models.hooks import Sites
from minipeft.models.t5 import T5

STARTS = ("vocabulary", "text", "normal")


@dataclass(frozen=True)
class PromptTuning(Method):
    """One user's prompt tuning.

    tokens: V. start_from: one of STARTS. text: for "text" its token ids, repeated until there are V.
    """

    name: ClassVar[str] = "prompt"
    summary: ClassVar[str] = "virtual tokens before the text"

    tokens: int = 20
    start_from: str = "vocabulary"
    text: tuple[int, ...] = ()

    def check(self, base: Sites) -> None:
        check_tokens(self.name, self.tokens, base)
        if self.start_from not in STARTS:
            raise InputError(f"prompt: start {self.start_from!r} is unknown; choose one of {', '.join(STARTS)}")
        if (self.start_from == "text") != bool(self.text):
            raise InputError(f"prompt: start from {self.start_from!r} with {len(self.text)} tokens of text; \"text\" "
                             "needs a text, and no other start takes one")
        vocab_size = len(base.embed.weight)
        if self.text and not 0 <= min(self.text) <= max(self.text) < vocab_size:
            raise InputError(f"prompt: text has token ids {min(self.text)} to {max(self.text)}; this base's are 0 to "
                             f"{vocab_size - 1}")  # fmt: skip
        if len(self.text) > self.tokens:
            raise InputError(f"prompt: text has {len(self.text)} tokens but there are {self.tokens} virtual ones; "
                             "raise tokens or shorten the text")

    def kind(self, base: Sites) -> tuple:
        return self.name, self.tokens  # not where it started

    def virtual(self, base: Sites) -> tuple[int, int]:
        return virtual_at_input(self.tokens, base)

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        return {"prompt": (self.tokens, base.embed.weight.shape[1])}

    def flops(self, base: Sites) -> int:
        return 0

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        table = base.embed.weight
        if self.start_from == "normal":
            prompt = torch.from_numpy(draw("prompt").standard_normal((self.tokens, table.shape[1]))).float()
        else:
            ids = (np.resize(np.array(self.text), self.tokens) if self.start_from == "text"
                   else draw("prompt").integers(len(table), size=self.tokens))  # fmt: skip
            prompt = table.detach()[torch.from_numpy(ids).to(table.device)].cpu().float() * base.embed_scale
        return {"prompt": prompt}

    def actor(self, bank: Bank, base: Sites) -> Actor:
        actor = Actor()
        actor.prompts["embed"] = vectors(bank, "prompt")
        return actor


def check_tokens(name: str, tokens: int, base: Sites) -> None:
    """Raises InputError unless there is at least one virtual token and room for a text after them."""
    longest = base.config.max_positions
    if tokens < 1 or (longest is not None and tokens >= longest):
        raise InputError(f"{name}: {tokens} virtual tokens; needed at least 1 and fewer than the base's positions, "
                         f"{'of which it has any number' if longest is None else longest}")


def virtual_at_input(tokens: int, base: Sites) -> tuple[int, int]:
    """Method.virtual of virtual tokens that stand before what a base reads."""
    return (0, tokens) if isinstance(base, T5) else (tokens, 0)
