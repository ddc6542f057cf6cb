"""An encoder that answers: one vector per text, and a linear map of it to the labels.

    logits = W mean(hidden states) + b                         C classes; pooling "mean"
             W tanh(pooler's map of [CLS]'s hidden state) + b  pooling "pooler", what BERT's own classifiers read

The base itself has no opinion: its W and b are zero. Each user trains their own beside it, at the site "head"
(methods/head.py). The bias is the weight of one more feature, which is always 1.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models.bert import Bert
from minipeft.models.causal import Causal
from minipeft.models.hooks import BASE, Hooks, Linear, Sites
from minipeft.models.rows import Rows
from minipeft.models.t5 import T5
from minipeft.models.top import Top

POOLINGS = ("mean", "pooler")


class Classifier(Sites, nn.Module):
    """A frozen encoder with a zero head of C classes, called like a decoder: `hidden`, then `head` at rows to read.

    Raises:
        InputError: pooling is none of POOLINGS, or "pooler" and the base has none.
    """

    causal = False

    def __init__(self, encoder: Bert, num_classes: int, pooling: str = "mean"):
        super().__init__()
        if pooling not in POOLINGS:
            raise InputError(f"pooling is {pooling!r}; needed one of {', '.join(map(repr, POOLINGS))}")
        if pooling == "pooler" and encoder.pooler is None:
            raise InputError(f"{encoder.origin.name if encoder.origin else 'this base'} has no pooler, its checkpoint "
                             "holds no pooler.dense; take pooling 'mean'")  # fmt: skip
        self.pooling = pooling
        self.encoder, self.config = encoder, encoder.config
        self.head_linear = Linear("head", encoder.config.width + 1, num_classes, bias=False)
        self.head_linear.weight = nn.Parameter(torch.zeros_like(self.head_linear.weight, device=encoder.device,
                                                                dtype=encoder.embed.weight.dtype))  # fmt: skip
        self.sites, self.shared_inputs, self.linears = encoder.sites, encoder.shared_inputs, encoder.linears
        self.norms, self.blocks, self.attentions = encoder.norms, encoder.blocks, encoder.attentions
        self.heads, self.embeddings = encoder.heads, encoder.embeddings
        self.head_size = (encoder.config.width + 1, num_classes)
        self.origin = encoder.origin
        self.requires_grad_(False)

    @property
    def recompute(self) -> bool:
        return self.encoder.recompute

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        self.encoder.recompute = wanted

    @property
    def embed(self) -> nn.Embedding:
        return self.encoder.embed

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    def hidden(self, rows: Rows, hooks: Hooks = BASE) -> Tensor:
        """Every row's text in one vector: [T, width + 1], its last hidden states pooled, and 1."""
        return self.read(rows, Top.all(rows, hooks), hooks)

    def read(self, rows: Rows, top: Top, hooks: Hooks = BASE) -> Tensor:
        """`hidden` of top's rows, [n, width + 1]: a text is read once or twice, not at all of its rows."""
        how = "first" if self.pooling == "pooler" else "mean"
        pooled = self.encoder.pool(self.last_hidden(rows, hooks), rows, how)  # [sequences, width]
        text_of_row = torch.from_numpy(np.repeat(np.arange(len(rows.lengths)), rows.lengths)).to(pooled.device)
        if self.pooling == "pooler":  # hooks know packed rows alone
            pooled = top.of(self.encoder.pooled(pooled.index_select(0, text_of_row), hooks))
        else:
            pooled = pooled.index_select(0, top.of(text_of_row))
        return F.pad(pooled, (0, 1), value=1.0)

    def last_hidden(self, rows: Rows, hooks: Hooks = BASE) -> Tensor:
        """The encoder's last hidden states [T, width]."""
        return self.encoder.hidden(rows, hooks)

    def head(self, h: Tensor, hooks: Hooks = BASE) -> Tensor:
        """Vectors of chosen rows [rows, width + 1] -> logits [rows, C]."""
        return self.head_linear(h, hooks)


Base = Causal | Classifier | T5  # what an engine runs on
