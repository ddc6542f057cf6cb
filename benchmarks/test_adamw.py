"""How fast is one AdamW step of many users, beside one torch.optim.AdamW per user?"""

import pytest
from conftest import SMALL


@pytest.mark.parametrize("way", ["ours", "loop"])
def test_step(timed, way):
    timed("adamw", way, SMALL, backward=False)
