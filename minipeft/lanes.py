"""Threads that run parts of a pass side by side, on a CPU.

PyTorch divides one operation among the cores, and lets all but one wait while Python runs between two operations and
while a small one is not worth dividing. In lanes each core runs operations of its own: about a tenth of a step of
MiniLM on two cores (docs/performance.md). A lane's operations are not divided unless there are more cores than lanes.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier

import torch

M_ARENA_MAX = -8  # of glibc's malloc.h
LEAST_ROWS = 1024  # of a lane: with fewer its operations are so short that lanes wait for each other's Python


def lanes_on(device: torch.device | str, token_budget: int) -> int:
    """One for each core that PyTorch uses on a CPU, as many as passes of so many rows fill; on a GPU one."""
    if torch.device(device).type != "cpu":
        return 1
    return max(1, min(torch.get_num_threads(), token_budget // LEAST_ROWS))


class Lanes:
    """So many threads, each with its share of the cores that PyTorch uses."""

    def __init__(self, number: int):
        one_arena()
        cores, there = torch.get_num_threads(), Barrier(number)
        self._share = max(1, cores // number)
        self._pool = ThreadPoolExecutor(number, "lane", torch.set_num_threads, (self._share,))
        try:
            wait([self._pool.submit(there.wait) for _ in range(number)])  # all have begun, and said what they take
        finally:
            there.abort()  # should one not begin, the others do not wait for it
            torch.set_num_threads(cores)

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run all of these to their ends; then raise what the first that failed has raised.

        How many threads a product takes is OpenMP's to know, for each thread that calls, and MKL's, for all of them
        at once: so the share holds for the caller, too, as long as it waits.
        """
        cores = torch.get_num_threads()
        torch.set_num_threads(self._share)
        try:
            done = [self._pool.submit(part) for part in parts]
            wait(done)
        finally:
            torch.set_num_threads(cores)
        for each in done:
            each.result()


def one_arena() -> None:
    """All threads allocate from one arena. glibc would give each its own, and keep what is free in all of them: a pass
    in two lanes took 150 MB more on MiniLM. Where malloc is another's there is nothing to set."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
