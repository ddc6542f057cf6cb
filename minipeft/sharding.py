"""A decoder larger than one GPU: its layers' matrices lie in parts on all ranks and come together when a layer runs.

    torchrun --nproc-per-node 8 -m minipeft train --shard-base ...

FSDP2 does it (torch.distributed.fsdp.fully_shard; Zhao et al. 2023, arXiv:2304.11277): each rank keeps 1/n of every
layer's matrices; before a layer runs, forward and again backward, all ranks gather it, and drop it afterwards.
Embeddings, head and vectors are whole on every rank.

Each rank still trains users of its own, and no gradient travels. But gathering takes all ranks: they must run the same
layers in the same order. So before each pass they agree of which kind it is (`Lockstep`). Who has nothing of that kind
runs an empty pass, of one token, and who has nobody left does so until nobody has.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from minipeft.errors import InputError
from minipeft.methods.dora import DoRA
from minipeft.methods.method import Method
from minipeft.models.causal import Causal
from minipeft.models.classifier import Base
from minipeft.models.rows import Rows
from minipeft.ranks import FOREVER, Ranks
from minipeft.schedule import PassConfig

IDLE, SCORE, TRAIN, STOP = range(4)  # what a rank wants next


class Stopped(Exception):
    """Some rank is to stop: all do, before the same pass."""


def shard(base: Base, device: torch.device | str, ranks: Ranks) -> None:
    """Leave of each layer's matrices this rank's part, on its device. All ranks call it, with the same base on the CPU.

    Raises:
        InputError: there is one rank only, or the base is no decoder.
    """
    if ranks.number == 1:
        raise InputError("--shard-base puts the base on several processes; start them with torchrun "
                         "--nproc-per-node N -m minipeft train ...")  # fmt: skip
    if not isinstance(base, Causal):
        raise InputError(f"--shard-base takes decoders, not a {type(base).__name__}")
    if base.origin is not None:
        base.origin.fingerprint  # noqa: B018  # cached from now on: later nobody has all of it
    device = torch.device(device)
    group = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=FOREVER)
    mesh = DeviceMesh.from_group(group, device.type)
    for layer in base.layers:
        vectors = {parameter for parameter in layer.parameters() if parameter.ndim == 1}
        fully_shard(layer, mesh=mesh, ignored_params=vectors)
    base.to(device)
    # Every pass goes back to the first layer, wherever its adapters act: the ranks' layers are the same ones.
    base.embed.register_forward_hook(lambda module, args, x: x.requires_grad_(torch.is_grad_enabled()))
    base.lockstep = Lockstep(base)


def check_sharded(method: Method, passes: PassConfig) -> None:
    """Raises InputError for a method that reads matrices beside the layers that own them, or slots "auto"."""
    if passes.slots == "auto":
        raise InputError("--shard-base: how many slots fit is not measured where ranks share the base; give --slots N")
    if any(isinstance(part, DoRA) for part in method.parts):
        raise InputError("--shard-base: dora needs the norms of whole matrices, which no process has; take lora")


class Lockstep:
    """The ranks' agreement on passes. stopping: whether this rank is to stop."""

    def __init__(self, base: Causal):
        self.base = base
        self.stopping: Callable[[], bool] = lambda: False
        self._group = dist.new_group(backend="gloo", timeout=FOREVER)
        self._last = IDLE

    def before(self, training: bool) -> None:
        """Returns when the next pass is of this kind at every rank. Raises Stopped."""
        wanted = TRAIN if training else SCORE
        while (agreed := self._agree(wanted)) != wanted:
            self._empty(agreed)

    def finish(self) -> None:
        """This rank has nobody left: keep the others company. Raises Stopped."""
        while (agreed := self._agree(IDLE)) != IDLE:
            self._empty(agreed)

    def _agree(self, wanted: int) -> int:
        """What most want; of two as many want, what did not come last."""
        votes = torch.zeros(4, dtype=torch.int64)
        votes[STOP if self.stopping() else wanted] = 1
        dist.all_reduce(votes, group=self._group)
        if votes[STOP]:
            raise Stopped
        score, train = int(votes[SCORE]), int(votes[TRAIN])
        if score == train:
            agreed = IDLE if not train else SCORE if self._last == TRAIN else TRAIN
        else:
            agreed = TRAIN if train > score else SCORE
        self._last = agreed
        return agreed

    def _empty(self, kind: int) -> None:
        with torch.set_grad_enabled(kind == TRAIN):
            hidden = self.base.hidden(Rows.pack([[0]], self.base.device))
            if kind == TRAIN:
                hidden.sum().backward()
