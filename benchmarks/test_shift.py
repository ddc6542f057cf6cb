"""How fast are everybody's biases added in one pass, beside the loop over users and gathered vectors?"""

import pytest
from conftest import SMALL


@pytest.mark.parametrize("way", ["ours", "gather", "loop"])
def test_forward_and_backward(timed, way):
    timed("shift", way, SMALL, backward=True)
