"""LoRA: a low-rank update beside a frozen linear map (Hu et al. 2021, arXiv:2106.09685).

    equation      y = W x + b + (alpha / rank) B A x                                    eq. 3
    trained       A [rank, K] and B [N, rank] at every chosen site (B is stored transposed)
    start         A uniform in +-1/sqrt(K), B zero: the base's output is unchanged. The paper draws A from a normal;
                  this is Hugging Face PEFT's and the authors' code's choice (Kaiming uniform with a = sqrt 5)
    numbers       rank * (K + N) per site
    cost          2 * rank * (K + N) FLOPs per row and site forward, three times that with backward

On an encoder (classifier.py) a user may also train a head of their own, which is no low-rank update but the whole map:

    equation      logits = W h + b, W [C, width], b [C] (the weight of a feature that is always 1)
    start         zero: every class is as likely
    numbers       C * (width + 1)
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
    num_classes: classes of the user's own head at the site "head" of an encoder; 0: no head.
    """

    rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    num_classes: int = 0

    def check(self, all_sites: dict[str, tuple[int, int]]) -> None:
        """Raises InputError if this configuration cannot act on a base with these sites."""
        if self.rank < 1:
            raise InputError(f"LoRA rank must be at least 1, got {self.rank}")
        if not self.sites:
            raise InputError("LoRA: no sites, so nothing would be trained; name at least one, e.g. q")
        if self.num_classes and ("head" in self.sites or all_sites.get("head", (0, 0))[1] != self.num_classes):
            raise InputError(f"LoRA: a head of {self.num_classes} classes needs a base whose site \"head\" has as many "
                             "outputs and no LoRA there; use a Classifier of as many classes")
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
        return _power_of_two(self.rank)

    def layout(self, all_sites: dict[str, tuple[int, int]]) -> Layout:
        """A user's row: for every chosen site "<site>.A" [R, K], then for each "<site>.Bt" [R, N], R the rank class.

        As lie one below the other, so that sites that share their input are one matrix to a kernel; Bts too. Last, if
        the user has a head, "head.W" [C, width + 1], C as a power of two from 8, its last column the bias.
        """
        chosen = self.chosen(all_sites)
        shapes = {f"{site}.A": (self.rank_class, K) for site, (K, _) in chosen.items()}
        shapes |= {f"{site}.Bt": (self.rank_class, N) for site, (_, N) in chosen.items()}
        if self.num_classes:
            shapes["head.W"] = (_power_of_two(self.num_classes), all_sites["head"][0])
        return Layout(shapes)

    def count(self, all_sites: dict[str, tuple[int, int]]) -> int:
        """Trained numbers of one user, padding not counted."""
        head = self.num_classes * all_sites["head"][0] if self.num_classes else 0
        return head + sum(self.rank * (K + N) for K, N in self.chosen(all_sites).values())

    def initial_row(self, all_sites: dict[str, tuple[int, int]], seed: int, user: str) -> Tensor:
        """A new user's row [P]: see `start` above. Matrix rows past the rank are zero."""
        layout = self.layout(all_sites)
        row = torch.zeros(layout.row_size)
        for site, (K, _) in self.chosen(all_sites).items():
            draw = generator(seed, user, "lora", site).uniform(-1, 1, (self.rank, K)) / np.sqrt(K)
            layout.view(row, f"{site}.A")[: self.rank] = torch.from_numpy(draw)
        return row

    def tensors(self, row: Tensor, all_sites: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        """A row [P] as files have it: "<site>.A" [rank, K] and "<site>.B" [N, rank]; "head.weight" and "head.bias"."""
        tensors = {}
        for name, tensor in self.layout(all_sites).tensors(row).items():
            site, _, kind = name.rpartition(".")
            if kind == "A":
                tensors[name] = tensor[: self.rank]
            elif kind == "Bt":
                tensors[f"{site}.B"] = tensor[: self.rank].T
            else:
                W = tensor[: self.num_classes]
                tensors["head.weight"], tensors["head.bias"] = W[:, :-1], W[:, -1]
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def row(self, tensors: dict[str, Tensor], all_sites: dict[str, tuple[int, int]]) -> Tensor:
        """Undoes `tensors`.

        Raises:
            InputError: a tensor is missing, left over, or of a shape that this base has not.
        """
        row = torch.zeros(self.layout(all_sites).row_size)
        expected = self.tensors(row, all_sites)
        for name, tensor in expected.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                came = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise InputError(f"{name} is {came}, this base needs {tuple(tensor.shape)}; was it trained on another "
                                 "base?")  # fmt: skip
        if left := sorted(tensors.keys() - expected.keys()):
            raise InputError(f"{left[0]} is no site of this base; was it trained on another base?")
        for name, part in self.layout(all_sites).tensors(row).items():
            site, _, kind = name.rpartition(".")
            if kind == "A":
                part[: self.rank] = tensors[name]
            elif kind == "Bt":
                part[: self.rank] = tensors[f"{site}.B"].T
            else:
                part[: self.num_classes] = torch.cat([tensors["head.weight"], tensors["head.bias"][:, None]], 1)
        return row


def _power_of_two(number: int) -> int:
    """The next power of two from 8: what kernels pad ranks to anyway."""
    return max(8, 1 << (number - 1).bit_length())


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
        num_slots: int, device: torch.device | str, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.bank = Bank(method.layout(all_sites), num_slots, device, dtype)
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
        if method.num_classes:
            self._views[("head",)] = self._head_view(method.num_classes)
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
        return on_cpu or can_join([sizes[site][1] for site in sites], R * len(sites), self.bank.compute.dtype)

    def _view(self, sites: tuple[str, ...], sizes: dict[str, tuple[int, int]]) -> dict:
        """The parameters of these sites, and their gradients, as fields of `Lora`."""
        layout, M, R, K = self.bank.layout, len(sites), self.rank_class, sizes[sites[0]][0]
        fields = {}
        for prefix, rows in (("", self.bank.compute), ("grad_", self.bank.grads)):
            start = layout.offsets[f"{sites[0]}.A"]
            fields[f"{prefix}A"] = rows[:, start : start + M * R * K].unflatten(1, (M * R, K))
            fields[f"{prefix}Bts"] = tuple(layout.view(rows, f"{site}.Bt") for site in sites)
        weights = self.bank.compute
        if backend(weights.device) == "triton":
            widths = [sizes[site][1] for site in sites]
            fields["sites"] = site_table(widths, M * R, weights.dtype, weights.device)
        return fields

    def _head_view(self, num_classes: int) -> dict:
        """A user's head as a LoRA whose B is the identity: y = I W h. Nobody reads the identity's gradient."""
        layout, rows = self.bank.layout, self.bank.compute
        W, grad_W = (layout.view(numbers, "head.W") for numbers in (rows, self.bank.grads))  # [U, C', width + 1]
        identity = torch.eye(W.shape[1], num_classes, device=rows.device, dtype=rows.dtype).expand(len(rows), -1, -1)
        unread = torch.empty(identity.shape, device=rows.device)
        return {"A": W, "Bts": (identity,), "grad_A": grad_W, "grad_Bts": (unread,),
                "scale": torch.ones_like(self.scale), "ranks": None}  # fmt: skip

    def _make_room_for_squares(self, num_slots: int, device: torch.device | str) -> None:
        """squares [U, Q]: columns of its own for every gradient of every view, whichever of them a pass writes."""
        itemsize = self.bank.weights.itemsize
        counts = [[num_squares(M.shape[1], M.shape[2], itemsize) for M in (view["grad_A"], *view["grad_Bts"])]
                  for view in self._views.values()]  # fmt: skip
        if ("head",) in self._views:
            counts[-1][1] = 0  # the identity's
        self.squares = torch.zeros(num_slots, sum(map(sum, counts)), device=device)
        columns = iter(self.squares.split([n for of_view in counts for n in of_view], dim=1))
        for view, of_view in zip(self._views.values(), counts):
            view["squares"] = tuple(part if part.shape[1] else None for part in (next(columns) for _ in of_view))

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
        fields = {"scale": self.scale, "ranks": ranks} | self._views[sites]
        return LoraRows(first_row, Lora(segments=segments, **fields))
