"""How long calls take, side by side, and what the machine can do at best.

On a GPU a call is timed with events around it. Before each one a buffer larger than the GPU's L2 cache is written, so
that every call finds its inputs in memory, and often enough that the GPU is still busy while Python issues the call:
what is measured is the GPU's time, unless issuing takes longer than LEAD_MS, which is then part of the answer. On a CPU
nothing is flushed: tensors that fit into its caches can beat a floor that is computed from the memory's speed.

Calls that are compared take turns, so that a slow moment of the machine meets all of them.
"""

import math
import time
from collections.abc import Callable
from statistics import median

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]  # milliseconds of one call
FLUSH_BYTES = 256 << 20  # larger than any L2 cache we know
LEAD_MS = 0.5
FEWEST, MOST = 5, 25  # turns of each call
SLOW_MS, SLOW_TURNS = 100, 3  # a call that is slower than this gets fewer turns
CEILING_TURNS = 10
COPY_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}  # several times what caches hold
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}


def cpu_clock(call: Call) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


class GpuClock:
    """Milliseconds of one call on the GPU, its inputs not in the L2 cache."""

    def __init__(self, device: torch.device | str, flush_bytes: int = FLUSH_BYTES):
        self._buffer = torch.empty(flush_bytes, dtype=torch.int8, device=device)
        self._num_flushes = 1
        self(self._buffer.zero_)  # the first one is slow
        self._num_flushes = max(1, math.ceil(LEAD_MS / self(self._buffer.zero_)))

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._num_flushes):
            self._buffer.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def clock_of(device: torch.device | str) -> Clock:
    return GpuClock(device) if torch.device(device).type == "cuda" else cpu_clock


def side_by_side(calls: dict[str, Call], clock: Clock, budget_s: float) -> dict[str, float]:
    """Median milliseconds of each call, the calls taking turns, for about budget_s if FEWEST and MOST turns allow.

    Each should have run before, so that nothing is compiled or set up now.
    """
    times = {name: [clock(call)] for name, call in calls.items()}
    turns = min(max(int(1e3 * budget_s / sum(first for (first,) in times.values())), FEWEST), MOST)
    for turn in range(1, turns):
        for name, call in calls.items():
            if turn < SLOW_TURNS or times[name][0] < SLOW_MS:
                times[name].append(clock(call))
    return {name: median(taken) for name, taken in times.items()}


def ceilings(device: torch.device | str, dtype: torch.dtype, clock: Clock) -> dict[str, float]:
    """What the machine does at best, now: the fastest of some large copies and of some large products.

    copy_gbps:      GB/s from memory to memory, bytes read and bytes written both counted.
    matmul_tflops:  TFLOP/s of a square product of random numbers in dtype.
    """
    kind = torch.device(device).type
    num_bytes, size = COPY_BYTES[kind], MATMUL_SIZE[kind]
    source = torch.randint(0, 100, (num_bytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy_ms = min(clock(lambda: target.copy_(source)) for _ in range(CEILING_TURNS))
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matmul_ms = min(clock(lambda: a @ b) for _ in range(CEILING_TURNS))
    return {"copy_gbps": 2 * num_bytes / copy_ms / 1e6, "matmul_tflops": 2 * size**3 / matmul_ms / 1e9}


def floor_ms(num_bytes: int, flops: int, ceilings: dict[str, float]) -> float:
    """No version can be faster: every byte counted once, or every product, at the measured ceiling."""
    return max(num_bytes / ceilings["copy_gbps"] / 1e6, flops / ceilings["matmul_tflops"] / 1e9)
