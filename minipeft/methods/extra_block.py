"""One more encoder block on a T5, a whole one for every user: PEFT-U's personalised head. See head.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.bank import Bank
from minipeft.methods.method import Actor, Share, vectors
from minipeft.models.attention import Packed
from minipeft.models.layers import SwiGLU, gelu_tanh, rms_norm
from minipeft.models.rows import Rows
from minipeft.models.t5 import T5
from minipeft_kernels.ia3 import ia3_rows
from minipeft_kernels.segment_matmul import segment_matmul
from minipeft_kernels.segments import VectorRows

PREFIX = "encoder.extra."


class ExtraBlock(Actor):
    """The block of all resident users, on the rows of a share: matrices [U, K, N] are kept as y = x W."""

    @staticmethod
    def shapes(base: T5) -> dict[str, tuple[int, ...]]:
        """"encoder.extra.attn.q" [K, N] and so on, as the base's last encoder layer, transposed; norms as they are."""
        return {PREFIX + name.removesuffix(".weight"): tuple(weight.shape[::-1])
                for name, weight in base.encoder.layers[-1].named_parameters()}  # fmt: skip

    @staticmethod
    def flops(base: T5) -> int:
        """Per input token, attention's scores aside: they depend on the text's length."""
        return sum(weight.ndim * weight.numel() for weight in base.encoder.layers[-1].parameters())

    @staticmethod
    def start(base: T5) -> dict[str, Tensor]:
        tensors = {}
        for name, weight in base.encoder.layers[-1].named_parameters():
            silent = name in ("attn.o.weight", "mlp.down.weight")
            numbers = torch.zeros_like(weight) if silent else weight.detach()
            tensors[PREFIX + name.removesuffix(".weight")] = numbers.t().float().cpu().contiguous()
        return tensors

    def __init__(self, bank: Bank, base: T5):
        super().__init__()
        self.base, self.last = base, base.encoder.layers[-1]
        self.own = {name.removeprefix(PREFIX): vectors(bank, name) for name in self.shapes(base)}
        self.tail = self._tail

    def _tail(self, x: Tensor, rows: Rows, share: Share) -> Tensor:
        """The block on a share's rows x [T_g, width]; rows are those of the whole pass."""
        ends = rows.lengths.cumsum()
        first, last = share.rows.start, share.rows.stop
        lengths = rows.lengths[(ends > first) & (ends <= last)]
        attend = Packed.plan(lengths, False, x.device)
        linear = lambda name, h: segment_matmul(h, share.anchor, *self.own[name], share.segments)  # noqa: E731

        def norm(name: str, h: Tensor) -> Tensor:
            gains = self.own[name]
            h = rms_norm(h, torch.ones_like(self.last.attn_norm.weight), self.base.config.norm_eps)
            return ia3_rows(h, share.anchor, [VectorRows(0, gains.values, share.segments, gains.grads)])

        h, D = norm("attn_norm", x), self.base.config.head_dim
        q, k, v = (linear(f"attn.{name}", h).unflatten(1, (-1, D)) for name in "qkv")
        biases = attend.scores_bias(self.base.encoder.bias)
        x = x + linear("attn.o", attend(self.last.attn.layer, q, k, v, biases=biases, scale=1.0).flatten(1))
        h = norm("mlp_norm", x)
        up, mlp = linear("mlp.up", h), self.last.mlp
        if mlp.gate is None:
            inner = F.relu(up)
        else:
            gate = linear("mlp.gate", h)
            inner = SwiGLU.apply(gate, up) if mlp.silu else gelu_tanh(gate) * up
        return x + linear("mlp.down", inner)
