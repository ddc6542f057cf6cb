"""A pass's hooks: at every site of the base, each row's own adapter, whichever method it is by.

The banks in a pass each say what their users do at a site (methods/method.py). Here that is collected over the banks
and done for all of them by one batched op per site and kind:

    linear   LoRA and the frozen product at once       lora_linear
             IA3, DoRA's magnitudes                    ia3_rows
             biases                                    shift_rows
    norm     weights of one's own                      ia3_rows
    block    bottleneck adapters                       bottleneck_rows
    keys     prefixes                                  prompt_rows
    embed    prompts                                   prompt_rows
             LoRA                                      embedding.py

A shared adapter may lie under the personal ones: then rows belong to two shares, and the shared one acts first.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.methods.method import Share
from minipeft.models.hooks import Hooks
from minipeft.models.rows import Rows
from minipeft_kernels.bottleneck import Bottleneck
from minipeft_kernels.bottleneck_rows import BottleneckRows, bottleneck_rows
from minipeft_kernels.cpu import tiled_linear
from minipeft_kernels.ia3 import ia3_rows
from minipeft_kernels.lora_linear import LoraRows, lora_linear
from minipeft_kernels.prompts import PromptRows, prompt_rows
from minipeft_kernels.segment_lora import segment_lora
from minipeft_kernels.segments import VectorRows
from minipeft_kernels.shift import shift_rows

Found = list[tuple[Share, object]]
TABLES = ("input_scales", "scales", "gains", "shifts", "bottlenecks", "prompts")  # an Actor's that `_found` looks into


class Acting(Hooks):
    """Hooks of one pass.

    Args:
        shares: each bank's part of the rows.
        under:  parts of shared adapters, over the same rows.
        anchor: see the kernels' *_rows ops. tile: see lora_linear; None outside of deterministic mode.
    """

    def __init__(self, shares: Sequence[Share], under: Sequence[Share], anchor: Tensor, tile: int | None):
        self.levels = [[(share, actor) for share in level for actor in share.residents.actors]
                       for level in (under, shares)]  # fmt: skip
        self.loras = [[(share, actor.loras_of(share)) for share, actor in level] for level in self.levels]
        self.anchor, self.tile = anchor, tile
        actors = [actor for level in self.levels for _, actor in level]
        self._sites = {table: set().union(*(getattr(actor, table) for actor in actors)) for table in TABLES}

    def linear(self, sites, x, weights, biases, products=None):
        scaled = [self._found("input_scales", site) for site in sites]
        if any(any(levels) for levels in scaled):
            if len(sites) > 1:  # each site then has an input of its own
                known = [None] * len(sites) if products is None else [[product] for product in products]
                return tuple(self.linear((site,), x, [w], [b], own)[0]
                             for site, w, b, own in zip(sites, weights, biases, known))  # fmt: skip
            for found in scaled[0]:
                x = self._scale(x, found)
            products = None  # which were those of another input
        ys = self._with_loras(sites, x, weights, biases, products)
        return tuple(self._finish(site, x, y) for site, y in zip(sites, ys))

    def _with_loras(self, sites, x, weights, biases, products) -> tuple[Tensor, ...]:
        """The frozen products and the personal LoRA."""

        def at(sites: tuple[str, ...]) -> list[LoraRows | None]:
            """Of each share, what acts at these sites; None for one that acts at some of them or none."""
            found = {id(share): None for share, _ in self.loras[-1]}
            for share, loras in self.loras[-1]:
                if sites in loras:
                    found[id(share)] = LoraRows(share.first_row, loras[sites])
            return list(found.values())

        def launch(launched: tuple[str, ...], found: list[LoraRows | None]) -> tuple[Tensor, ...]:
            W, b, known = zip(*((weights[i], biases[i], products and products[i])
                                for i in (sites.index(site) for site in launched)))  # fmt: skip
            known = known if products else None
            if loras := [lora for lora in found if lora is not None]:
                return lora_linear(x, self.anchor, W, b, loras, self.tile, known)
            return known or tuple(F.linear(x, w, c) if self.tile is None else tiled_linear(x, w, c, self.tile)
                         for w, c in zip(W, b))  # fmt: skip

        singly = {(site,): at((site,)) for site in sites}
        # Where every bank acts at the same sites of one input, they go in one launch. In deterministic mode never:
        # whether they do would depend on the company.
        joint = tuple(site for site in sites if any(singly[site,]))
        together = at(joint) if self.tile is None and len(joint) > 1 else [None]
        launches = {joint: together} if all(together) else {}
        launches |= {one: found for one, found in singly.items() if not (launches and one[0] in joint)}
        ys = {}
        for launched, found in launches.items():
            ys |= zip(launched, launch(launched, found))
        return tuple(ys[site] for site in sites)

    def _finish(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        """What comes after the frozen product and the personal LoRA."""
        for share, loras in self.loras[0]:
            if lora := loras.get((site,)):  # a shared one, under the personal ones
                delta = segment_lora(x[share.rows], lora.A, lora.Bts[0], lora.scale, share.segments, lora.ranks,
                                     by_pieces=True)  # fmt: skip
                y = _AddRows.apply(y, delta, share.rows)
        for level in self.levels:
            for share, actor in level:
                if site in actor.deltas:
                    y = _AddRows.apply(y, actor.deltas[site](x[share.rows], share), share.rows)
        for found in self._found("scales", site):
            y = self._scale(y, found)
        return self._shift(site, y)

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        y = norm(x)
        for found in self._found("gains", norm.site):
            for share, gains in found:
                h = norm.normalised(x[share.rows])
                own = ia3_rows(h, self.anchor, [VectorRows(0, gains.values, share.segments, gains.grads)])
                y = _ReplaceRows.apply(y, own + norm.offset * h if norm.offset else own, share.rows)
        return self._shift(norm.site, y)

    def block(self, site: str, y: Tensor, read: Tensor, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        for found in self._found("bottlenecks", site):
            for reads in ("output", "sum", "input"):
                groups = [BottleneckRows(share.first_row, Bottleneck(b.weights, b.grads, b.activation, share.segments,
                                                                     b.scale, b.widths))
                          for share, b in found if b.reads == reads]  # fmt: skip
                if not groups:
                    continue
                if reads == "output":
                    y = bottleneck_rows(y, None, self.anchor, groups)
                elif reads == "sum":
                    y = bottleneck_rows(x + y if norm is None else norm(x + y), y, self.anchor, groups)
                else:
                    y = bottleneck_rows(read, y, self.anchor, groups)
        return y

    def keys(self, site: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self._prompts(f"{site}.{name}", y.flatten(1)).view_as(y) for name, y in (("k", k), ("v", v)))

    def embed(self, x: Tensor, tokens: Tensor, scale: Tensor | None = None) -> Tensor:
        return self._prompts("embed", super().embed(self._embedded("embed", x, tokens), tokens, scale))

    def embed_targets(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self._embedded("targets", x, tokens)

    def _embedded(self, which: str, x: Tensor, tokens: Tensor) -> Tensor:
        for level in self.levels:
            for share, actor in level:
                if which in actor.embeds:
                    x = _AddRows.apply(x, actor.embeds[which](tokens[share.rows], share), share.rows)
        return x

    def tail(self, x: Tensor, rows: Rows) -> Tensor:
        for level in self.levels:
            for share, actor in level:
                if actor.tail is not None:
                    x = _ReplaceRows.apply(x, actor.tail(x[share.rows], rows, share), share.rows)
        return x

    def _found(self, table: str, site: str) -> list[Found]:
        """What acts here, level by level; a share whose users stack methods may act several times, one by one."""
        rounds = []
        if site not in self._sites[table]:
            return rounds
        for level in self.levels:
            of_share: dict[int, list] = {}
            for share, actor in level:
                if site in getattr(actor, table):
                    of_share.setdefault(id(share), []).append((share, getattr(actor, table)[site]))
            rounds += [[acts[i] for acts in of_share.values() if i < len(acts)]
                       for i in range(max(map(len, of_share.values()), default=0))]  # fmt: skip
        return rounds

    def _scale(self, x: Tensor, found: Found) -> Tensor:
        return ia3_rows(x, self.anchor, [VectorRows(s.first_row, v.values, s.segments, v.grads) for s, v in found])

    def _shift(self, site: str, y: Tensor) -> Tensor:
        for found in self._found("shifts", site):
            y = shift_rows(y, self.anchor, [VectorRows(s.first_row, v.values, s.segments, v.grads) for s, v in found])
        return y

    def _prompts(self, site: str, x: Tensor) -> Tensor:
        for found in self._found("prompts", site):
            groups = [PromptRows(v.values, s.prompts, v.grads) for s, v in found if s.prompts is not None]
            x = prompt_rows(x, self.anchor, groups) if groups else x
        return x


class _AddRows(torch.autograd.Function):
    """y with delta added to some of its rows."""

    @staticmethod
    def forward(ctx, y, delta, rows):
        ctx.rows, y = rows, y.clone()
        y[rows] += delta
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y, grad_y[ctx.rows], None


class _ReplaceRows(torch.autograd.Function):
    """y with some of its rows replaced."""

    @staticmethod
    def forward(ctx, y, own, rows):
        ctx.rows, y = rows, y.clone()
        y[rows] = own
        return y

    @staticmethod
    def backward(ctx, grad_y):
        own, grad_y = grad_y[ctx.rows].clone(), grad_y.clone()
        grad_y[ctx.rows] = 0.0
        return grad_y, own, None
