"""What the benchmarks share: every op small, on this machine's device, checked before it is timed."""

import pytest
import torch

from minipeft.kernel_cases import Point, exactly, make, relative_error, run, tolerance
from minipeft.kernel_ops import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SMALL = Point("flan-t5-base", 768, (768,), rank=8, T=2048, users=128)


@pytest.fixture
def timed(benchmark):
    """timed(op, way, point, backward): compare with the definition in fp64, then time."""

    def check_and_time(name: str, way: str, point: Point, backward: bool) -> None:
        op = OPS[name]
        inputs = make(op, point, DEVICE, DTYPE)
        if way != "frozen":
            error = relative_error(run(op, way, inputs, backward), exactly(op, inputs, backward), inputs)
            assert error <= tolerance(op, inputs, way)

        def call():
            op.ways[way](inputs, backward)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{name} {'forward and backward' if backward else 'forward'}, {point.distribution}"
        benchmark(call)

    return check_and_time
