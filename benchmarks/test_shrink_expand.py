"""How fast are LoRA's two products in one launch, however the rows are shared out, beside the ways people run them?"""

from dataclasses import replace

import pytest
from conftest import DEVICE, SMALL

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="a kernel's launcher: it runs on a GPU")


@pytest.mark.parametrize("way", ["ours", "loop", "padded_bmm", "grouped_mm"])
@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_one_direction(timed, way, distribution):
    timed("shrink_expand", way, replace(SMALL, distribution=distribution), backward=False)
