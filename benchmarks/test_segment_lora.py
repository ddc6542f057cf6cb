"""How fast is everybody's LoRA in one pass, beside the ways people run it today, however the rows are shared out?"""

from dataclasses import replace

import pytest
from conftest import SMALL

WAYS = ("ours", "loop", "padded_bmm", "grouped_mm")  # gather_bmm takes seconds: see python -m minipeft.bench kernels


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("distribution", ["uniform", "zipf", "absent"])
def test_forward_and_backward(timed, way, distribution):
    timed("segment_lora", way, replace(SMALL, distribution=distribution), backward=True)


@pytest.mark.parametrize("way", WAYS)
def test_forward(timed, way):
    timed("segment_lora", way, SMALL, backward=False)


@pytest.mark.parametrize("way", ["frozen", *WAYS])
def test_beside_the_frozen_product(timed, way):
    """frozen: the base alone, without any adapter."""
    timed("lora_linear", way, SMALL, backward=True)
