"""One user, every method, in plain PyTorch as its paper writes it: what fused passes are compared with.

`PlainHooks` applies one user's tensors, as `Method.tensors` gives them, to a base; autograd does the rest, in fp64.
"""

import torch
import torch.nn.functional as F

from minipeft.models.attention import Packed
from minipeft.models.hooks import Hooks
from minipeft.models.layers import gelu_tanh
from minipeft.models.rows import Rows
from minipeft.models.t5 import T5
from minipeft_kernels.activations import ACTIVATIONS


class PlainHooks(Hooks):
    """method: its first part acts, beside a head if there is one. tensors: name -> fp64 tensor.

    virtual: virtual tokens at the start of the only sequence.
    """

    def __init__(self, method, tensors, base, virtual):
        self.method, self.t, self.base, self.virtual = method.parts[0], tensors, base, virtual
        self.prefixes = plain_prefixes(self.method, tensors, base)

    def linear(self, sites, x, weights, biases):
        return tuple(self._one(site, x, W, b) for site, W, b in zip(sites, weights, biases))

    def _one(self, site, x, W, b):
        name, t = self.method.name, self.t
        if site == "head" and "head.weight" in t:
            return F.linear(x[:, :-1], t["head.weight"], t["head.bias"])
        if name == "bitfit" and b is not None:
            return F.linear(x, W, t[f"{site}.bias"])
        if name == "ia3" and f"{site}.l" in t:
            scale = t[f"{site}.l"]
            return F.linear(x * scale, W, b) if self.method.at_input(site) else F.linear(x, W, b) * scale
        if name == "vera" and f"{site}.d" in t:
            A, B = (M.double() for M in self.method.projections(self.base))
            inner = F.linear(x, A[:, : W.shape[1]]) * t[f"{site}.d"]
            return F.linear(x, W, b) + F.linear(inner, B[: len(W)]) * t[f"{site}.d_b"]
        if name in ("lora", "dora") and f"{site}.A" in t:
            update = self.method.scale_of(site) * t[f"{site}.B"] @ t[f"{site}.A"]
            if name == "lora":
                return F.linear(x, W + update, b)
            length = (W + update).norm(dim=1).detach()
            return F.linear(x, (t[f"{site}.m"] / length)[:, None] * (W + update), b)
        return F.linear(x, W, b)

    def norm(self, norm, x):
        weight, bias = self.t.get(f"{norm.site}.weight"), self.t.get(f"{norm.site}.bias")
        if self.method.name == "bitfit" and bias is not None:
            return norm.normalised(x) * norm.weight + bias
        if self.method.name != "layernorm" or weight is None:
            return norm(x)
        y = norm.normalised(x) * (weight + norm.offset)
        return y if bias is None else y + bias

    def block(self, site, y, read, x, norm=None):
        if f"{site}.down" not in self.t:
            return y
        down, down_bias, up, up_bias = (self.t[f"{site}.{name}"] for name in ("down", "down_bias", "up", "up_bias"))
        h = {"output": y, "sum": x + y if norm is None else norm(x + y), "input": read}[self.method.reads]
        inner = ACTIVATIONS[self.method.activation](F.linear(h, down, down_bias))
        return y + self.method.scale * (inner @ up + up_bias)

    def keys(self, site, k, v):
        return tuple(self._begun(f"{site}.{name}", x.flatten(1)).view_as(x) for name, x in (("k", k), ("v", v)))

    def embed(self, x, tokens):
        return self._begun("embed", self.embed_targets(x, tokens))

    def embed_targets(self, x, tokens):
        if self.method.name == "lora" and "embed.A" in self.t:
            x = x + self.method.scale_of("embed") * self.t["embed.A"].T[tokens] @ self.t["embed.B"].T
        return x

    def _begun(self, name, x):
        rows = self.prefixes.get(name)
        return x if rows is None else torch.cat([rows, x[self.virtual :]])

    def tail(self, x, rows):
        if self.method.name != "head":
            return x
        t = {name.removeprefix("encoder.extra."): tensor for name, tensor in self.t.items()}
        last, D = self.base.encoder.layers[-1], self.base.config.head_dim
        h = last.attn_norm.normalised(x) * t["attn_norm"]
        q, k, v = ((h @ t[f"attn.{name}"]).unflatten(1, (-1, D)).transpose(0, 1) for name in "qkv")  # [H, T, D]
        ages = torch.arange(len(x))[:, None] - torch.arange(len(x))
        scores = q @ k.transpose(1, 2) + self.base.encoder.bias(ages[None])[0]
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ t["attn.o"]
        h = last.mlp_norm.normalised(x) * t["mlp_norm"]
        inner = gelu_tanh(h @ t["mlp.gate"]) * (h @ t["mlp.up"]) if "mlp.gate" in t else torch.relu(h @ t["mlp.up"])
        return x + inner @ t["mlp.down"]


def plain_prefixes(method, tensors, base):
    """Where -> rows of virtual tokens, by PyTorch's own modules."""
    if method.name == "prompt":
        return {"embed": tensors["prompt"]}
    if method.name == "ptuning":
        return {"embed": plain_encoder(method, tensors)}
    if method.name != "prefix":
        return {}
    if not method.hidden:
        return tensors
    h = torch.tanh(F.linear(tensors["embedding"], tensors["W1"], tensors["b1"]))
    parts = F.linear(h, tensors["W2"], tensors["b2"]).split(list(method.prefixes(base).values()), dim=1)
    return dict(zip(method.prefixes(base), parts))


def plain_encoder(method, tensors):
    """P-tuning's virtual tokens, by torch.nn.LSTM."""
    x = tensors["embedding"]
    if method.encoder == "lstm":
        lstm = torch.nn.LSTM(x.shape[1], method.hidden, method.layers, bidirectional=True, batch_first=True)
        names = {name.removesuffix("_r") + "_reverse" * name.endswith("_r"): tensor for name, tensor in tensors.items()
                 if name.startswith(("weight", "bias"))}  # fmt: skip
        x = torch.func.functional_call(lstm.double(), names, (x[None],))[0][0]
    last = sum(name.startswith("mlp") for name in tensors) // 2 - 1
    for i in range(last + 1):
        x = F.linear(x, tensors[f"mlp.{i}.weight"], tensors[f"mlp.{i}.bias"])
        x = x if i == last else torch.relu(x)
    return x


def plain_log_probs(base, method, tensors, read):
    """Log-probabilities at the rows of one Read, the user alone in the world: [num_read, vocab]."""
    own, source = method.virtual(base)
    hooks = PlainHooks(method, tensors, base, own)
    tokens = (0,) * own + read.tokens
    rows = Rows.pack([tokens], causal=base.causal, virtual=[own])
    if isinstance(base, T5):
        inputs = Rows.pack([(0,) * source + read.inputs], causal=False)
        reading = PlainHooks(method, tensors, base, source)
        keys = base.cross_keys(base.encode_rows(inputs, reading), reading)
        cross = Packed.plan(rows.lengths, False, "cpu", k_lengths=inputs.lengths)
        hidden = base.decode_rows(rows, keys, cross, hooks)
    else:
        hidden = base.hidden(rows, hooks)
    return base.head(hidden[-read.num_read :], hooks).log_softmax(-1)
