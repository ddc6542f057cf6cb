"""How fast is LoRA with one row per user, beside the ways people run it?"""

from dataclasses import replace

import pytest
from conftest import SMALL


@pytest.mark.parametrize("way", ["ours", "loop", "gather_bmm", "padded_bmm", "grouped_mm"])
def test_one_row_per_user(timed, way):
    timed("bgmv", way, replace(SMALL, T=SMALL.users), backward=False)
