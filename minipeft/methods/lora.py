"""LoRA: a low-rank update beside a frozen linear map (Hu et al. 2021, arXiv:2106.09685).

    equation      y = W x + b + (alpha / rank) B A x                                    eq. 3
    trained       A [rank, K] and B [N, rank] at every chosen site (B is stored transposed)
    start         A uniform in +-1/sqrt(K), B zero: the base's output is unchanged. The paper draws A from a normal;
                  this is Hugging Face PEFT's and the authors' code's choice (Kaiming uniform with a = sqrt 5)
    numbers       rank * (K + N) per site
    cost          2 * rank * (K + N) FLOPs per row and site forward, three times that with backward
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from minipeft.bank import Bank, Layout
from minipeft.errors import InputError
from minipeft.randomness import generator
from minipeft_kernels.backend import backend
from minipeft_kernels.lora_linear import LoraRows
from minipeft_kernels.segment_lora import Lora
from minipeft_kernels.segments import Segments
from minipeft_kernels.shrink_expand import can_join, site_table
from minipeft_kernels.wgrad import num_squares


@dataclass(frozen=True)
class LoRA:
    """One user's LoRA configuration.

    rank:  inner width of the update, no unit.
    alpha: the update is scaled by alpha / rank.
    sites: last words of the site names it acts at, e.g. ("q", "v"); a full name like "layers.3.attn.q" picks one.
    """

    rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    def check(self, all_sites: dict[str, tuple[int, int]]) -> None:
        """Raises InputError if this configuration cannot act on a base with these sites."""
        if self.rank < 1:
            raise InputError(f"LoRA rank must be at least 1, got {self.rank}")
        if not self.sites:
            raise InputError("LoRA: no sites, so nothing would be trained; name at least one, e.g. q")
        for name in self.sites:
            if not any(_picks(name, site) for site in all_sites):
                kinds = sorted({site.rsplit(".", 1)[-1] for site in all_sites})
                raise InputError(f"LoRA: no site of this base is called {name!r}; it has {', '.join(kinds)}")
        for site, (K, N) in self.chosen(all_sites).items():
            if self.rank > min(K, N):
                raise InputError(f"LoRA rank {self.rank} is above the width of {site} ({K} in, {N} out); lower it")

    def chosen(self, all_sites: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """The sites it acts at, with their (K, N)."""
        return {site: size for site, size in all_sites.items() if any(_picks(name, site) for name in self.sites)}

    @property
    def rank_class(self) -> int:
        """The rank its bank is padded to: the next power of two from 8. A function of this user's rank alone."""
        return max(8, 1 << (self.rank - 1).bit_length())

    def layout(self, all_sites: dict[str, tuple[int, int]]) -> Layout:
        """A user's row: for every chosen site "<site>.A" [R, K], then for each "<site>.Bt" [R, N], R the rank class.

        As lie one below the other, so that sites that share their input are one matrix to a kernel; Bts too.
        """
        chosen = self.chosen(all_sites)
        shapes = {f"{site}.A": (self.rank_class, K) for site, (K, _) in chosen.items()}
        return Layout(shapes | {f"{site}.Bt": (self.rank_class, N) for site, (_, N) in chosen.items()})

    def count(self, all_sites: dict[str, tuple[int, int]]) -> int:
        """Trained numbers of one user, padding not counted."""
        return sum(self.rank * (K + N) for K, N in self.chosen(all_sites).values())

    def initial_row(self, all_sites: dict[str, tuple[int, int]], seed: int, user: str) -> Tensor:
        """A new user's row [P]: see `start` above. Matrix rows past the rank are zero."""
        layout = self.layout(all_sites)
        row = torch.zeros(layout.row_size)
        for site, (K, _) in self.chosen(all_sites).items():
            draw = generator(seed, user, "lora", site).uniform(-1, 1, (self.rank, K)) / np.sqrt(K)
            layout.view(row, f"{site}.A")[: self.rank] = torch.from_numpy(draw)
        return row


def _picks(name: str, site: str) -> bool:
    return site == name or site.endswith("." + name)



class LoraBank:
    """All resident users whose LoRA has the same sites and rank class: their rows, and each slot's scale and rank.

    bank:  [U, P] buffers; parameters as in LoRA.layout.
    scale: [U] fp32, alpha / rank. ranks: [U] int32.
    squares: on a GPU [U, Q] fp32: sums of squares that the backward pass leaves for the gradient's norm. Zero it before
           a pass: which columns are written depends on which sites share launches. None on a CPU.

    Args:
        all_sites, shared_inputs: the base's, see Decoder.
    """

    def __init__(
        self, method: LoRA, all_sites: dict[str, tuple[int, int]], shared_inputs: Sequence[tuple[str, ...]],
        num_slots: int, device: torch.device | str,
    ):  # fmt: skip
        self.bank = Bank(method.layout(all_sites), num_slots, device)
        self.rank_class = method.rank_class
        self.scale = torch.zeros(num_slots, device=device)
        self.ranks = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._ranks = np.zeros(num_slots, dtype=np.int32)  # the same on the host
        self.squares: Tensor | None = None
        chosen = method.chosen(all_sites)
        self._views = {(site,): self._view((site,), chosen) for site in chosen}
        for group in shared_inputs:
            acting = tuple(site for site in group if site in chosen)
            if len(acting) > 1 and self._can_join(acting, chosen):
                self._views[acting] = self._view(acting, chosen)
        if backend(device) == "triton":
            self._make_room_for_squares(num_slots, device)

    def _can_join(self, sites: tuple[str, ...], sizes: dict[str, tuple[int, int]]) -> bool:
        """Whether these sites' matrices lie one after another without a gap, and a kernel can take them at once."""
        offsets, R = self.bank.layout.offsets, self.rank_class
        for site, after in pairwise(sites):
            K, N = sizes[site]
            if offsets[f"{after}.A"] != offsets[f"{site}.A"] + R * K:
                return False
            if offsets[f"{after}.Bt"] != offsets[f"{site}.Bt"] + R * N:
                return False
        on_cpu = backend(self.scale.device) == "torch"
        return on_cpu or can_join([sizes[site][1] for site in sites], R * len(sites), self.bank.weights.dtype)

    def _view(self, sites: tuple[str, ...], sizes: dict[str, tuple[int, int]]) -> dict:
        """The parameters of these sites, and their gradients, as fields of `Lora`."""
        layout, M, R, K = self.bank.layout, len(sites), self.rank_class, sizes[sites[0]][0]
        fields = {}
        for prefix, rows in (("", self.bank.weights), ("grad_", self.bank.grads)):
            start = layout.offsets[f"{sites[0]}.A"]
            fields[f"{prefix}A"] = rows[:, start : start + M * R * K].unflatten(1, (M * R, K))
            fields[f"{prefix}Bts"] = tuple(layout.view(rows, f"{site}.Bt") for site in sites)
        weights = self.bank.weights
        if backend(weights.device) == "triton":
            widths = [sizes[site][1] for site in sites]
            fields["sites"] = site_table(widths, M * R, weights.dtype, weights.device)
        return fields

    def _make_room_for_squares(self, num_slots: int, device: torch.device | str) -> None:
        """squares [U, Q]: columns of its own for every gradient of every view, whichever of them a pass writes."""
        counts = [[num_squares(M.shape[1], M.shape[2]) for M in (view["grad_A"], *view["grad_Bts"])]
                  for view in self._views.values()]  # fmt: skip
        self.squares = torch.zeros(num_slots, sum(map(sum, counts)), device=device)
        columns = iter(self.squares.split([n for of_view in counts for n in of_view], dim=1))
        for view, of_view in zip(self._views.values(), counts):
            view["squares"] = tuple(next(columns) for _ in of_view)

    def admit(self, user: str, method: LoRA, row: Tensor) -> int:
        """Put a user's row [P] into a free slot and return the slot."""
        slot = self.bank.admit(user, row)
        self.scale[slot] = method.alpha / method.rank
        self.ranks[slot] = self._ranks[slot] = method.rank
        return slot

    def at(self, sites: tuple[str, ...], first_row: int, segments: Segments) -> LoraRows | None:
        """What `lora_linear` needs to act for these segments at sites that share an input.

        None if the method does not act at all of them, or they cannot be taken at once.
        """
        if sites not in self._views:
            return None
        masked = (self._ranks[segments.slots] < self.rank_class).any()
        ranks = self.ranks if masked else None
        return LoraRows(first_row, Lora(scale=self.scale, ranks=ranks, segments=segments, **self._views[sites]))
