"""--profile: where the time goes, as a Chrome trace and a table of kernels.

Open trace.json in chrome://tracing or https://ui.perfetto.dev. On a GPU the named regions are NVTX ranges too, which
`nsys` and `ncu --nvtx` show.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

NUM_ROWS = 40  # of the table


@contextmanager
def region(name: str) -> Iterator[None]:
    """What runs inside `profiled` and this appears under this name. Costs next to nothing elsewhere."""
    if not torch.autograd._profiler_enabled():
        yield
        return
    on_gpu = torch.cuda.is_available()
    with record_function(name):
        if on_gpu:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.nvtx.range_pop()


@contextmanager
def profiled(out: Path) -> Iterator[None]:
    """Profile what runs inside. Writes trace.json and kernels.txt to the folder `out` and prints the table."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        yield
    profiler.export_chrome_trace(str(out / "trace.json"))
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=NUM_ROWS, max_name_column_width=60)
    (out / "kernels.txt").write_text(table)
    print(table)
    print(f"written: {out}/trace.json, kernels.txt")
