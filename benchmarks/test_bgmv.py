"""How fast is LoRA with one row per user, beside gathered matrices and the loop?"""

from dataclasses import replace

import pytest
from conftest import SMALL


@pytest.mark.parametrize("way", ["ours", "gather_bmm", "loop"])
def test_one_row_per_user(timed, way):
    timed("bgmv", way, replace(SMALL, T=SMALL.users), backward=False)
