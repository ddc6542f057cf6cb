"""One vector per text from the frozen base: the mean of its last hidden states, made of length 1.

What all-MiniLM's sentence embedding is (Reimers & Gurevych 2019, arXiv:1908.10084). Computed once per distinct text.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.models.classifier import Base, Classifier
from minipeft.models.rows import Rows
from minipeft.models.t5 import T5
from minipeft.models.trunk import Tokens, groups_within

TOKEN_BUDGET = 4096  # rows in a pass


def features(base: Base, texts: Iterable[Sequence[int]]) -> dict[Tokens, np.ndarray]:
    """Token ids of a text -> its feature [width] fp32, for each distinct text."""
    return {text: F.normalize(mean, dim=0).cpu().numpy() for text, mean in means(base, texts).items()}


def means(base: Base, texts: Iterable[Sequence[int]]) -> dict[Tokens, Tensor]:
    """The same before it is made of length 1, on the base's device."""
    found: dict[Tokens, Tensor] = {}
    for group in groups_within(sorted(dict.fromkeys(map(tuple, texts)), key=len), TOKEN_BUDGET):
        found |= zip(group, _means(base, group))
    return found


@torch.no_grad()
def _means(base: Base, texts: list[Tokens]) -> Tensor:
    """[texts, width]"""
    causal = base.causal and not isinstance(base, T5)
    rows = Rows.pack(texts, base.device, causal)
    if isinstance(base, Classifier):
        hidden = base.last_hidden(rows)
    else:
        hidden = base.encode_rows(rows) if isinstance(base, T5) else base.hidden(rows)
    starts = torch.from_numpy(np.cumsum(rows.lengths) - rows.lengths).to(hidden.device)
    text_rows = torch.arange(len(hidden), device=hidden.device)
    return F.embedding_bag(text_rows, hidden.float(), starts, mode="mean")
