"""Threads that run parts of a pass side by side, on a CPU.

PyTorch divides one operation among the cores, and lets all but one wait while Python runs between two operations and
while a small one is not worth dividing. In lanes each core runs operations of its own: about a tenth of a step of
MiniLM on two cores (docs/performance.md). A lane's operations are not divided unless there are more cores than lanes.
"""

import ctypes
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

M_ARENA_MAX = -8  # of glibc's malloc.h


def lanes_on(device: torch.device | str) -> int:
    """One for each core that PyTorch uses on a CPU; on a GPU one."""
    return torch.get_num_threads() if torch.device(device).type == "cpu" else 1


def lanes_of(args: Namespace) -> int:
    """What a command takes that has --device and --model: the default base's operations are so short that lanes would
    wait for each other's Python, so it has one."""
    return lanes_on(args.device) if args.model is not None else 1


class Lanes:
    """So many threads, each with its share of the cores that PyTorch uses."""

    def __init__(self, number: int):
        one_arena()
        share = max(1, torch.get_num_threads() // number)
        self._pool = ThreadPoolExecutor(number, "lane", torch.set_num_threads, (share,))

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run all of these to their ends; then raise what the first that failed has raised."""
        done = [self._pool.submit(part) for part in parts]
        wait(done)
        for each in done:
            each.result()


def one_arena() -> None:
    """All threads allocate from one arena. glibc would give each its own, and keep what is free in all of them: a pass
    in two lanes took 150 MB more on MiniLM. Where malloc is another's there is nothing to set."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
