"""Fused maps: q, k and v that Hugging Face keeps as one module. Adapters of the parts <-> one adapter of the module.

Parts to module, exact, with s the largest of the parts' scales s_q, s_k, s_v:

    LoRA    A = [A_q; A_k; A_v],  B = [B_q s_q / s, 0, 0;  0, B_k s_k / s, 0;  0, 0, B_v s_v / s]: ranks add up
    DoRA    the same, and m = [m_q; m_k; m_v]
    IA3     l = [l_q; l_k; l_v], where it rescales outputs

A part that has no adapter gets zeros; for DoRA the length of its weights, for IA3 ones.

Module to parts, exact too: each part gets its own rows of B, m and l, and of A a copy of those rows that its rows of B
use; a part that uses none, none: what was fused here comes back as it was. A that parts shared is each part's own from
then on: they train apart. Two cases have a rank of their own:

    all of B zero                    a fresh adapter: every part gets the first rows of A, as many as fit its width
    more ranks than a part's width   A' = B A of that part, B' = 1: a rank of its width says as much
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop.modules import Module, own_numbers, short_sites
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.method import Method
from minipeft.models.hooks import Sites

Words = dict[str, Tensor]  # last word of a tensor's name -> the tensor, of one site or module


def check_fused(method: Method, sites: list[str], modules: Mapping[str, Module]) -> None:
    """Raises InputError if the method acts at a part of a fused map in a way that the whole map cannot."""
    for site in sites:
        if modules[site].outputs is None or isinstance(method, LoRA):
            continue
        if not isinstance(method, IA3):
            raise InputError(f"{method.name}: {site} is a part of {modules[site].path}, one fused map in the Hugging "
                             "Face model, whose projections are others than the part's; choose sites that are whole")
        if method.at_input(site):
            raise InputError(f"ia3: {site} is a part of {modules[site].path}, one fused map in the Hugging Face model "
                             "with one input; only outputs of parts are rescaled apart")


def parts_of(path: str, modules: Mapping[str, Module]) -> dict[str, Tensor]:
    """Site -> which outputs of this module are its own."""
    return {site: module.outputs for site, module in modules.items() if module.path == path}


def rank_and_alpha(method: LoRA, sites: list[str]) -> tuple[int, float]:
    """Of the module that these sites are, one as a whole or some as its parts."""
    if len(sites) == 1:
        return method.rank_of(sites[0]), method.alpha_of(sites[0])
    rank = sum(method.rank_of(site) for site in sites)
    return rank, method.alpha_for(largest_scale(method, sites), rank)


def largest_scale(method: LoRA, sites: list[str]) -> float:
    return max((method.scale_of(site) for site in sites), key=abs)


def join(method: Method, path: str, adapters: Mapping[str, Words], base: Sites, modules: Mapping[str, Module]) -> Words:
    """The module's tensors from its parts', site by site."""
    parts = parts_of(path, modules)
    N = sum(map(len, parts.values()))
    if isinstance(method, IA3):
        l = torch.ones(N)  # noqa: E741
        for site, words in adapters.items():
            l[parts[site]] = words["l"]
        return {"l": l}
    s, columns = largest_scale(method, list(adapters)), []
    for site, words in adapters.items():
        own = method.scale_of(site)
        column = torch.zeros(N, method.rank_of(site))
        column[parts[site]] = words["B"] if own == s else words["B"] * (own / s)
        columns.append(column)
    joined = {"A": torch.cat([words["A"] for words in adapters.values()]), "B": torch.cat(columns, 1)}
    if any("m" in words for words in adapters.values()):
        joined["m"] = torch.empty(N)
        for site, outputs in parts.items():
            joined["m"][outputs] = adapters[site]["m"] if site in adapters else lengths(site, base)
    return joined


def part(word: str, whole: Words, outputs: Tensor, used: Tensor | None) -> Tensor:
    """A part's tensor from the module's. outputs: which are the part's. used: which ranks, of LoRA."""
    if word not in ("A", "B"):
        return whole[word][outputs]
    A, B = whole["A"][used], whole["B"][outputs][:, used]
    if len(used) > len(outputs):
        A, B = (B.double() @ A.double()).to(A.dtype), torch.eye(len(outputs), dtype=B.dtype)
    return A if word == "A" else B


def shape(method: Method, word: str, site: str, base: Sites, modules: Mapping[str, Module]) -> tuple[int, ...]:
    """Of the module's tensor, whose part this site is. method: at the rank of the module."""
    K, N = base.sites[site][0], sum(map(len, parts_of(modules[site].path, modules).values()))
    if isinstance(method, IA3):
        return N, 1
    return {"A": (method.rank_of(site), K), "B": (N, method.rank_of(site)), "m": (N,)}[word]


def used_ranks(method: LoRA, site: str, whole: Words, base: Sites, modules: Mapping[str, Module]) -> Tensor:
    """Which of the module's ranks a part uses: where its rows of B are not zero. method: at the rank of the module.

    The first ones, as many as fit, if B is zero as a whole, if the part has a length of its own for its weights (DoRA),
    or if the file has no such B, which is then refused for that.
    """
    B, m, outputs = whole.get("B"), whole.get("m"), modules[site].outputs
    first = torch.arange(min(method.rank_of(site), *base.sites[site]))
    if B is None or B.shape != shape(method, "B", site, base, modules) or not B.any():
        return first
    used = B[outputs].any(0).nonzero()[:, 0]
    own_length = m is not None and not torch.equal(m[outputs], lengths(site, base))
    return first if own_length and not len(used) else used


def lengths(site: str, base: Sites) -> Tensor:
    """Of the frozen weights of every output: [N] fp32."""
    return base.linears[site].weight.detach().float().norm(dim=1).cpu()


def narrowed(method: LoRA, used: Mapping[str, Tensor], base: Sites) -> LoRA:
    """The method with these parts at the ranks that they use, their scale kept; without those that use none."""
    ranks = {site: min(len(used[site]), base.sites[site][1]) if site in used else method.rank_of(site)
             for site in method.chosen(base)}  # fmt: skip
    ranks = {site: rank for site, rank in ranks.items() if rank}
    alphas = {site: method.alpha_of(site) if rank == method.rank_of(site)
              else method.alpha_for(method.scale_of(site), rank) for site, rank in ranks.items()}  # fmt: skip
    return replace(method, sites=short_sites(ranks, method.places(base)),
                   ranks=own_numbers(ranks, method.rank, method.places(base)),
                   alphas=own_numbers(alphas, method.alpha, method.places(base)))  # fmt: skip
