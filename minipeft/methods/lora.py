"""LoRA: a low-rank update beside a frozen linear map (Hu et al. 2021, arXiv:2106.09685).

    equation      y = W x + b + s B A drop(x)       s = alpha / rank                         eq. 3
                                                    s = alpha / sqrt(rank)                   rsLoRA (arXiv:2312.03732)
                  e = E[token] + s B A[token]       at the embedding, whose input is a token's number; on a T5 it is one
                                                    for inputs and targets
    trained       A [rank, K] and B [N, rank] at every chosen site (B is stored transposed)
    start         A uniform in +-1/sqrt(K), B zero: the base's output is unchanged. The paper draws A from a normal;
                  this is Hugging Face PEFT's and the authors' code's choice (Kaiming uniform with a = sqrt 5). At the
                  embedding, as there, A is zero and B normal
    numbers       rank * (K + N) per site; at the embedding rank * (vocabulary + width)
    cost          2 * rank * (K + N) FLOPs per row and site forward, three times that with backward; at the embedding
                  2 * rank * width, on a T5 for either side, at the head only for rows that predict a target, and so
                  in a decoder's last layer but at k and v
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from minipeft.bank import Bank
from minipeft.errors import InputError
from minipeft.methods.embedding import EmbeddingUpdate
from minipeft.methods.method import Actor, Draw, IfThere, Method, SecondUse, Share, choose, picks, vectors
from minipeft.models.hooks import Sites
from minipeft.models.t5 import T5
from minipeft.randomness import keys_of
from minipeft_kernels.backend import backend
from minipeft_kernels.blocks import MOST_RANKS
from minipeft_kernels.segment_lora import Lora
from minipeft_kernels.segments import to_device
from minipeft_kernels.shrink_expand import can_join, site_table

SCALINGS = ("lora", "rslora")


@dataclass(frozen=True)
class LoRA(Method):
    """One user's LoRA configuration.

    rank:  inner width of the update, no unit; at linear maps at most 256 on a GPU.
    alpha: the update is scaled by alpha / rank.
    sites: last words of the site names it acts at, e.g. ("q", "v"); a full name like "layers.3.attn.q" picks one;
           "embed" is the token embedding, "head" the map to the vocabulary.
    dropout: share of the update's input that is dropped in training, a multiple of 1/256 (dropout.py).
    scaling: "rslora": alpha / sqrt(rank) instead.
    ranks, alphas: (site name, number) pairs: another rank or alpha where the name picks.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "a low-rank update of linear maps"

    rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = IfThere(("q", "k", "v", "o", "gate", "up", "down"))
    dropout: float = 0.0
    scaling: str = "lora"
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()

    def check(self, base: Sites) -> None:
        if self.rank < 1 or any(rank < 1 for _, rank in self.ranks):
            raise InputError(f"LoRA rank must be at least 1, got {min(self.rank, *(r for _, r in self.ranks))}"
                             if self.ranks else f"LoRA rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1 or (self.dropout and not 1 <= round(256 * self.dropout) <= 255):
            raise InputError(f"LoRA dropout must be at least 0 and below 1, in steps of 1/256, got {self.dropout}")
        if not all(math.isfinite(alpha) for alpha in (self.alpha, *(alpha for _, alpha in self.alphas))):
            raise InputError(f"LoRA alpha must be a finite number, got {self.alpha} and {self.alphas}")
        for name, _ in (*self.ranks, *self.alphas):
            if not any(picks(name, site) for site in self.chosen(base)):
                raise InputError(f"LoRA: {name!r} has a rank or alpha of its own but is none of the sites "
                                 f"{', '.join(self.sites)}")  # fmt: skip
        if self.scaling not in SCALINGS:
            raise InputError(f"LoRA scaling {self.scaling!r} is unknown; choose one of {', '.join(SCALINGS)}")
        for site, (K, N) in self.chosen(base).items():
            if self.rank_of(site) > min(K, N):
                raise InputError(f"LoRA rank {self.rank_of(site)} is above the width of {site} ({K} in, {N} out); "
                                 "lower it")  # fmt: skip
        for site in self.linear(base):
            if self.rank_of(site) > MOST_RANKS and base.device.type != "meta" and backend(base.device) == "triton":
                raise InputError(f"LoRA rank {self.rank_of(site)} at {site}: on a GPU ranks are at most {MOST_RANKS}; "
                                 "lower it, or use a CPU")  # fmt: skip

    def chosen(self, base: Sites) -> dict[str, tuple[int, int]]:
        """The sites it acts at, with their (K, N)."""
        return choose("LoRA", self.sites, self.places(base))

    @staticmethod
    def places(base: Sites) -> dict[str, tuple[int, int]]:
        """All sites at which a LoRA could act."""
        return base.sites | base.heads | base.embeddings

    def linear(self, base: Sites) -> dict[str, tuple[int, int]]:
        """Those of them that are linear maps."""
        return {site: size for site, size in self.chosen(base).items() if site not in base.embeddings}

    def rank_of(self, site: str) -> int:
        for name, rank in self.ranks:
            if picks(name, site):
                return rank
        return self.rank

    def alpha_of(self, site: str) -> float:
        for name, alpha in self.alphas:
            if picks(name, site):
                return alpha
        return self.alpha

    def scale_of(self, site: str) -> float:
        rank = self.rank_of(site)
        return self.alpha_of(site) / (rank**0.5 if self.scaling == "rslora" else rank)

    def alpha_for(self, scale: float, rank: int) -> float:
        """Undoes scale_of: which alpha gives this scale at this rank."""
        return scale * (rank**0.5 if self.scaling == "rslora" else rank)

    def rank_class(self, site: str = "") -> int:
        """The rank its bank is padded to: the next power of two from 8. A function of this user's rank alone."""
        return max(8, 1 << (self.rank_of(site) - 1).bit_length())

    def kind(self, base: Sites) -> tuple:
        classes = tuple((site, self.rank_class(site)) for site in self.chosen(base))
        return self.name, classes, self.dropout > 0, self.ranks, self.alphas

    def shapes(self, base: Sites) -> dict[str, tuple[int, ...]]:
        """For every chosen site "<site>.A" [R, K], then for each "<site>.Bt" [R, N], R the rank class.

        As lie one below the other, so that sites that share their input are one matrix to a kernel; Bts too.
        """
        linear = self.linear(base)
        shapes = {f"{site}.A": (self.rank_class(site), K) for site, (K, _) in linear.items()}
        shapes |= {f"{site}.Bt": (self.rank_class(site), N) for site, (_, N) in linear.items()}
        for site, (vocab_size, width) in self.chosen(base).items():
            if site in base.embeddings:
                R = self.rank_class(site)
                shapes |= {f"{site}.At": (vocab_size, R), f"{site}.Bt": (R, width)}
        return shapes

    def count(self, base: Sites) -> int:
        return sum(self.rank_of(site) * (K + N) for site, (K, N) in self.chosen(base).items())

    def flops(self, base: Sites) -> int:
        sides = 2 if isinstance(base, T5) else 1  # the one embedding embeds inputs and targets
        return sum(2 * self.rank_of(site) * (sides * N if site in base.embeddings else K + N)
                   for site, (K, N) in self.chosen(base).items())  # fmt: skip

    def start(self, base: Sites, draw: Draw) -> dict[str, Tensor]:
        tensors = {}
        for site, (K, N) in self.chosen(base).items():
            rank = self.rank_of(site)
            if site in base.embeddings:
                A, B = np.zeros((rank, K)), draw(site).standard_normal((N, rank))
            else:
                A, B = draw(site).uniform(-1, 1, (rank, K)) / np.sqrt(K), np.zeros((N, rank))
            tensors |= {f"{site}.A": torch.from_numpy(A).float(), f"{site}.B": torch.from_numpy(B).float()}
        return tensors

    def tensors(self, row: Tensor, base: Sites) -> dict[str, Tensor]:
        """A row [P] as files have it: "<site>.A" [rank, K] and "<site>.B" [N, rank]; vectors as they are."""
        tensors = {}
        for name, tensor in self.layout(base).tensors(row).items():
            site, _, matrix = name.rpartition(".")
            if tensor.ndim == 2:
                own = tensor[:, : self.rank_of(site)] if matrix == "At" else tensor[: self.rank_of(site)]
                tensors[f"{site}.{matrix[0]}"] = own if matrix == "A" else own.T
            else:
                tensors[name] = tensor
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def row(self, tensors: dict[str, Tensor], base: Sites) -> Tensor:
        row = torch.zeros(self.layout(base).row_size)
        self.check_tensors(tensors, self.tensors(row, base))
        for name, part in self.layout(base).tensors(row).items():
            site, _, matrix = name.rpartition(".")
            if part.ndim == 1:
                part.copy_(tensors[name])
            elif matrix == "At":
                part[:, : self.rank_of(site)] = tensors[f"{site}.A"].T
            else:
                part[: self.rank_of(site)] = tensors[name] if matrix == "A" else tensors[f"{site}.B"].T
        return row

    def actor(self, bank: Bank, base: Sites) -> "LoraActor":
        return LoraActor(self, bank, base)


class LoraActor(Actor):
    """All resident users whose LoRA has the same sites and rank classes: each slot's scale and rank beside their rows.

    settings: site -> (scale [U] fp32, ranks [U] int32, the ranks on the host); sites without a pattern of their own
              share one.
    """

    def __init__(self, method: LoRA, bank: Bank, base: Sites):
        super().__init__()
        self.bank, chosen = bank, method.chosen(base)
        U, device = len(bank.weights), bank.weights.device
        make = lambda: (torch.zeros(U, device=device), torch.zeros(U, dtype=torch.int32, device=device),  # noqa: E731
                        np.zeros(U, dtype=np.int32))  # fmt: skip
        shared = make()
        own = {name for pattern in (method.ranks, method.alphas) for name, _ in pattern}
        self.settings = {site: make() if any(picks(name, site) for name in own) else shared for site in chosen}
        self.thresholds = np.zeros(U, dtype=np.int64)
        self.input_of = {site: group[0] for group in (*base.shared_inputs, *zip(base.heads)) for site in group}
        linear = method.linear(base)
        self.loras = {(site,): self._view((site,), linear) for site in linear}
        # Without its first site too: a decoder's last layer calls q apart from k and v (top.py).
        for group in (part for whole in base.shared_inputs for part in (whole, whole[1:])):
            acting = tuple(site for site in group if site in linear)
            if len(acting) > 1 and acting not in self.loras and self._can_join(acting, linear):
                self.loras[acting] = self._view(acting, linear)
        for site in chosen.keys() & base.embeddings.keys():
            At, Bt, scale = vectors(bank, f"{site}.At"), vectors(bank, f"{site}.Bt"), self.settings[site][0]
            self.embeds["embed"] = EmbeddingUpdate(At, Bt, scale)
            if isinstance(base, T5):
                again = SecondUse(At), SecondUse(Bt)
                self.embeds["targets"] = EmbeddingUpdate(*(use.vectors for use in again), scale)
                self.derived += again

    def _can_join(self, sites: tuple[str, ...], sizes: dict[str, tuple[int, int]]) -> bool:
        """Whether these sites' matrices lie one after another without a gap, and a kernel can take them at once."""
        layout = self.bank.layout
        R, (scale, _, _) = layout.shapes[f"{sites[0]}.A"][0], self.settings[sites[0]]
        if any(self.settings[site][0] is not scale for site in sites):
            return False
        for site, after in pairwise(sites):
            K, N = sizes[site]
            if layout.offsets[f"{after}.A"] != layout.offsets[f"{site}.A"] + R * K:
                return False
            if layout.offsets[f"{after}.Bt"] != layout.offsets[f"{site}.Bt"] + R * N:
                return False
        on_cpu = backend(scale.device) == "torch"
        return on_cpu or can_join([sizes[site][1] for site in sites], R * len(sites), self.bank.compute.dtype)

    def _view(self, sites: tuple[str, ...], sizes: dict[str, tuple[int, int]]) -> dict:
        """The parameters of these sites, and their gradients, as fields of `Lora`."""
        layout, M, K = self.bank.layout, len(sites), sizes[sites[0]][0]
        R, fields = layout.shapes[f"{sites[0]}.A"][0], {"scale": self.settings[sites[0]][0]}
        for prefix, rows in (("", self.bank.compute), ("grad_", self.bank.grads)):
            start = layout.offsets[f"{sites[0]}.A"]
            fields[f"{prefix}A"] = rows[:, start : start + M * R * K].unflatten(1, (M * R, K))
            fields[f"{prefix}Bts"] = tuple(layout.view(rows, f"{site}.Bt") for site in sites)
        weights = self.bank.compute
        if backend(weights.device) == "triton":
            fields["sites"] = site_table([sizes[site][1] for site in sites], M * R, weights.dtype, weights.device)
        return fields

    def admit(self, slot: int, method: LoRA) -> None:
        self.thresholds[slot] = round(256 * method.dropout)
        for site, (scale, ranks, host_ranks) in self.settings.items():
            scale[slot] = method.scale_of(site)
            ranks[slot] = host_ranks[slot] = method.rank_of(site)

    def loras_of(self, share: Share) -> dict[tuple[str, ...], Lora]:
        loras, drops, slots = {}, self._drops(share), share.segments.slots
        for sites, view in self.loras.items():
            _, ranks, host_ranks = self.settings[sites[0]]
            masked = (host_ranks[slots] < self.bank.layout.shapes[f"{sites[0]}.A"][0]).any()
            loras[sites] = Lora(segments=share.segments, ranks=ranks if masked else None,
                                drop=drops.get(self.input_of[sites[0]]), **view)  # fmt: skip
        return loras

    def _drops(self, share: Share) -> dict[str, Tensor]:
        """By input, each segment's dropout there, [S, 2] int64 (dropout.py), in one copy; {} where nothing is dropped.

        An input has the name of the first site that reads it: sites that share it share the mask, but for a decoder's
        last q, whose rows are counted among those that are read (top.py).
        """
        inputs = {self.input_of[sites[0]] for sites in self.loras}
        if share.steps is None or not inputs or not self.thresholds.any():
            return {}
        thresholds = self.thresholds[share.segments.slots]
        tables = [np.stack([keys_of(share.keys, share.steps, name), thresholds], 1) for name in inputs]
        return dict(zip(inputs, to_device(np.stack(tables), self.bank.weights.device)))
