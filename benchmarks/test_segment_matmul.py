"""How fast is a matrix per user in one product, beside the loop over users, gathered matrices and padded rows?"""

import pytest
from conftest import SMALL


@pytest.mark.parametrize("way", ["ours", "loop", "gather_bmm", "padded_bmm", "grouped_mm"])
def test_forward_and_backward(timed, way):
    timed("segment_matmul", way, SMALL, backward=True)
