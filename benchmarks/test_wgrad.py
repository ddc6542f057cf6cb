"""How fast are weight gradients by themselves? On a GPU; the CPU path has them in segment_lora only."""

from dataclasses import replace

import pytest
from conftest import DEVICE, SMALL

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="a kernel's launcher: it runs on a GPU")


@pytest.mark.parametrize("way", ["ours", "loop", "padded_bmm", "grouped_mm"])
@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_weight_gradient(timed, way, distribution):
    timed("wgrad", way, replace(SMALL, distribution=distribution), backward=True)
