"""How fast are everybody's soft prompts put in, beside one indexed copy and the loop over sequences?"""

from dataclasses import replace

import pytest
from conftest import SMALL


@pytest.mark.parametrize("way", ["ours", "gather", "loop"])
def test_forward_and_backward(timed, way):
    timed("prompts", way, replace(SMALL, rank=20, users=32), backward=True)
