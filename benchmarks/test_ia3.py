"""How fast is everybody's IA3 in one pass, beside the loop over users and gathered vectors?"""

import pytest
from conftest import SMALL


@pytest.mark.parametrize("way", ["ours", "gather", "loop"])
def test_forward_and_backward(timed, way):
    timed("ia3", way, SMALL, backward=True)
