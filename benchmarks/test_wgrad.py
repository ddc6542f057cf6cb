"""How fast are weight gradients by themselves? The kernel on a GPU; the CPU path has them in segment_lora only."""

from dataclasses import replace

import pytest
from conftest import DEVICE, SMALL

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="a kernel's launcher: it runs on a GPU")


@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_weight_gradient(timed, distribution):
    timed("wgrad", "ours", replace(SMALL, distribution=distribution), backward=True)
