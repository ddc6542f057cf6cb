"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): memory for time, layer by layer.

A layer keeps its input alone and runs forward a second time when its gradients are wanted: a third more work. On a CPU
no bit of a gradient differs, because every function gives the same bits on every run there.
"""

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint


def run(model: nn.Module, layer: nn.Module, *args) -> Tensor:
    """layer(*args), checkpointed if model.recompute is set and somebody wants gradients."""
    if not (model.recompute and is_grad_enabled()):
        return layer(*args)
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
