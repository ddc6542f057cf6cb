"""What every op's test shares: the accuracy an op owes, and the segment lengths that break ops."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

LENGTHS = {"one user": [64], "one row each": [1, 1, 1], "an empty user": [0, 5, 17], "skewed": [130, 3, 1, 250],
           "around a tile": [15, 16, 17, 31, 33], "nobody": [0, 0]}  # fmt: skip
ANY_LENGTHS = st.lists(st.one_of(st.sampled_from([0, 1, 15, 16, 17, 32, 33]), st.integers(0, 90)),
                       min_size=1, max_size=6)  # fmt: skip
few_examples = settings(derandomize=True, max_examples=15, deadline=None,
                        suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def assert_as_accurate(name: str, kernel: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The op errs at most twice as much as plain PyTorch in the same dtype, both against fp64.

    Root mean square, not the worst number: one row of one rank leaves few numbers, and their worst is luck. Plain
    PyTorch may be lucky with few numbers too, so one unit in the last place of fp32 is allowed beside.
    """
    assert kernel.shape == exact.shape, f"{name}: shape {tuple(kernel.shape)}, not {tuple(exact.shape)}"
    allowed = 2 * rms(plain.detach().cpu().double() - exact) + 1.2e-7 * max(1.0, rms(exact))
    error = rms(kernel.detach().cpu().double() - exact)
    assert error <= allowed, f"{name}: error {error:.2e}, plain PyTorch errs {allowed / 2:.2e}"


def in_fp64(inputs):
    """The same inputs, floating point tensors in fp64."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
