"""How fast are everybody's bottleneck adapters in one pass, beside the ways people run them?"""

from dataclasses import replace

import pytest
from conftest import SMALL


@pytest.mark.parametrize("way", ["ours", "loop", "padded_bmm", "grouped_mm"])
def test_forward_and_backward(timed, way):
    timed("bottleneck", way, replace(SMALL, rank=48), backward=True)
