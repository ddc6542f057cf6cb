"""How many users may be resident and how many rows a pass may have: from the memory that is free, measured.

    rows of a pass  = half of the free memory / (2 x what one row keeps for the backward pass)      at most MOST_ROWS
    resident users  = a quarter of the free memory / what one slot takes            at most twice what fills a pass

One pass of a few users' minibatches is run to see what a row keeps, of fewer where memory does not hold it; the factor
2 is for what lives shorter: gradients, the softmax, an op's own temporaries. Should a pass not fit after all, the
engine takes it in parts (engine.py).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from minipeft.engine import Engine, NoRoom, out_of_memory
from minipeft.errors import InputError
from minipeft.labels import Classes, LabelSet
from minipeft.lanes import LEAST_ROWS
from minipeft.models.classifier import Base
from minipeft.schedule import Job, PassConfig

CGROUP = Path("/sys/fs/cgroup")  # a container's own limit
MOST_ROWS = {"cpu": 2048, "cuda": 32768}  # larger passes are not faster
ROWS_KEPT = 5  # what a slot takes, in rows: weights, gradients, two moments, the best row; saving takes one user's more


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still allocate, if its equals on this machine take as much.

    A file's pages that nobody used lately count as free, as in MemAvailable: the system takes them back when need be.

    Raises:
        InputError: the system does not tell.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = [_meminfo()]
    if (CGROUP / "memory.max").exists() and (most := (CGROUP / "memory.max").read_text().strip()) != "max":
        usage = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free.append(int(most) - int((CGROUP / "memory.current").read_text()) + int(usage["inactive_file"]))
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun says how many processes it started here


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        raise InputError("slots \"auto\": this system does not say how much memory is free; give a number") from None


def fitted(passes: PassConfig, base: Base, labels: LabelSet | Classes, jobs: Sequence[Job]) -> PassConfig:
    """`passes` with the slots and the token budget that memory holds, for users like those of these jobs; and no more
    lanes than such passes fill.

    Raises:
        InputError: memory does not even hold one of them.
    """
    free = free_memory(base.device)
    while True:
        try:
            kept, num_rows = _kept_bytes(replace(passes, slots=len(jobs), lanes=1), base, labels, jobs)
            break
        except (NoRoom, RuntimeError, MemoryError) as error:
            if not (isinstance(error, NoRoom) or out_of_memory(error)):
                raise
            if len(jobs) == 1:
                raise InputError(f"memory on {base.device} does not hold one user's minibatch; free some or lower the "
                                 "batch size") from None  # fmt: skip
        jobs = jobs[: len(jobs) // 2]
    rows = min(MOST_ROWS[base.device.type], int(free / 2 / (2 * kept / num_rows)))
    numbers = max(job.config.method.layout(base).row_size for job in jobs)
    slot_bytes = numbers * (4 * ROWS_KEPT + (base.dtype.itemsize if base.dtype != torch.float32 else 0))
    slots = min(int(free / 4 / slot_bytes), -(-2 * rows * len(jobs) // num_rows))
    if min(rows, slots) < 1:
        raise InputError(f"{free / 2**20:.0f} MiB of memory are free on {base.device}: not enough for one user, who "
                         f"takes {(2 * kept / len(jobs) + slot_bytes) / 2**20:.0f}; free some or lower the batch size")
    return replace(passes, slots=slots, token_budget=rows, lanes=min(passes.lanes, max(1, rows // LEAST_ROWS)))


def _kept_bytes(passes: PassConfig, base: Base, labels: LabelSet | Classes, jobs: Sequence[Job]) -> tuple[int, int]:
    """What a pass with these users' first minibatches keeps for its backward pass, in bytes, and its rows."""
    engine = Engine(base, labels, passes)
    runs = sorted((engine.begin(job) for job in jobs), key=lambda run: (run.bank, run.slot))
    num_rows = sum(run.minibatch(labels).num_rows for run in runs)
    with kept_bytes(base) as kept:
        engine.train_step(runs)
    return sum(kept.values()), num_rows


@contextmanager
def kept_bytes(base: Base) -> Iterator[dict[int, int]]:
    """Storage -> its bytes, of everything but the base's weights that is kept for a backward pass in here."""
    frozen = {weight.untyped_storage().data_ptr() for weight in base.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
