"""Linear maps of a frozen base, called through one function, so that a pass can add each row's own adapter.

Every linear map has a site name, e.g. "layers.3.attn.q". Maps that share an input are called together, as
`linear(sites, x, weights, biases)`: the base alone passes `plain_linear`, the engine one that knows the users.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (sites, x [T, K], weights, biases) -> y [T, N] of each site; the sites share their input
LinearFn = Callable[[tuple[str, ...], Tensor, list[Tensor], list[Tensor | None]], tuple[Tensor, ...]]


def plain_linear(
    sites: tuple[str, ...], x: Tensor, weights: list[Tensor], biases: list[Tensor | None]
) -> tuple[Tensor, ...]:
    """y = x W^T + b for each site: the base alone, no adapter anywhere."""
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases))


class Linear(nn.Module):
    """A linear map that knows its site name, e.g. "layers.3.attn.q"."""

    def __init__(self, site: str, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.site = site
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor, linear: LinearFn) -> Tensor:
        return together((self,), x, linear)[0]


def together(linears: Sequence[Linear], x: Tensor, linear: LinearFn) -> tuple[Tensor, ...]:
    """y of linear maps that share the input x, e.g. q, k and v."""
    return linear(tuple(m.site for m in linears), x, [m.weight for m in linears], [m.bias for m in linears])


def sites_of(groups: Iterable[Sequence[Linear]]) -> tuple[dict[str, tuple[int, int]], tuple[tuple[str, ...], ...]]:
    """A model's `sites` and `shared_inputs` from its linear maps, in groups that share their input, in forward order.

    sites: site name -> (in features K, out features N). shared_inputs: the site names of each group.
    """
    groups = [tuple(group) for group in groups]
    sites = {m.site: (m.weight.shape[1], m.weight.shape[0]) for group in groups for m in group}
    return sites, tuple(tuple(m.site for m in group) for group in groups)
