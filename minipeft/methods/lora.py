"""LoRA: a low-rank update beside a frozen linear map (Hu et al. 2021, arXiv:2106.09685).

    equation      y = W x + b + (alpha / rank) B A x                                    eq. 3
    trained       A [rank, K] and B [N, rank] at every chosen site (B is stored transposed)
    start         A uniform in +-1/sqrt(K), B zero: the base's output is unchanged. The paper draws A from a normal;
                  this is Hugging Face PEFT's and the authors' code's choice (Kaiming uniform with a = sqrt 5)
    numbers       rank * (K + N) per site
    cost          2 * rank * (K + N) FLOPs per row and site forward, three times that with backward
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minipeft.bank import Bank, Layout
from minipeft.errors import InputError
from minipeft.randomness import generator
from minipeft_kernels.segment_lora import LoraRows
from minipeft_kernels.segments import Segments


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
        """A user's row: for every chosen site "<site>.A" [R, K] and "<site>.Bt" [R, N], R the rank class."""
        shapes = {}
        for site, (K, N) in self.chosen(all_sites).items():
            shapes[f"{site}.A"] = (self.rank_class, K)
            shapes[f"{site}.Bt"] = (self.rank_class, N)
        return Layout(shapes)

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
    scale: [U] fp32, alpha / rank. ranks: [U] int64.
    """

    def __init__(
        self, method: LoRA, all_sites: dict[str, tuple[int, int]], num_slots: int, device: torch.device | str
    ):
        self.bank = Bank(method.layout(all_sites), num_slots, device)
        self.rank_class = method.rank_class
        self.scale = torch.zeros(num_slots, device=device)
        self.ranks = torch.zeros(num_slots, dtype=torch.int64, device=device)
        view = self.bank.layout.view
        self._views = {  # A, Bt and their gradients
            site: [view(numbers, f"{site}.{name}") for numbers in (self.bank.weights, self.bank.grads)
                   for name in ("A", "Bt")]
            for site in method.chosen(all_sites)
        }

    def admit(self, user: str, method: LoRA, row: Tensor) -> int:
        """Put a user's row [P] into a free slot and return the slot."""
        slot = self.bank.admit(user, row)
        self.scale[slot] = method.alpha / method.rank
        self.ranks[slot] = method.rank
        return slot

    def at(self, site: str, first_row: int, segments: Segments, full_rank: bool) -> LoraRows | None:
        """What `lora_linear` needs to act for these segments at a site; None if the method does not act there.

        Args:
            full_rank: every slot in the segments uses the whole rank class, so nothing needs masking.
        """
        if site not in self._views:
            return None
        A, Bt, grad_A, grad_Bt = self._views[site]
        ranks = None if full_rank else self.ranks
        return LoraRows(first_row, A, Bt, self.scale, ranks, segments, grad_A, grad_Bt)
