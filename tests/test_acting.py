"""Do rows that an adapter adds to or replaces get those values, and every input its gradient?"""

import pytest
import torch

from minipeft.acting import _AddRows, _ReplaceRows

ROWS = {"in the middle": slice(2, 5), "all": slice(0, 7), "none": slice(3, 3)}


def make_inputs(rows):
    """y [7, 3] and what comes to its rows, in fp64."""
    draw = torch.Generator().manual_seed(0)
    y, own = (torch.randn(n, 3, generator=draw, dtype=torch.float64) for n in (7, rows.stop - rows.start))
    return y.requires_grad_(), own.requires_grad_()


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_added_rows(rows):
    y, delta = make_inputs(rows)
    before = y.detach().clone()
    expected = before.clone()
    expected[rows] = before[rows] + delta.detach()
    assert torch.equal(_AddRows.apply(y, delta, rows), expected) and torch.equal(y, before)
    assert torch.autograd.gradcheck(_AddRows.apply, (y, delta, rows))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_replaced_rows(rows):
    y, own = make_inputs(rows)
    before, grad_y = y.detach().clone(), torch.ones_like(y)
    expected = before.clone()
    expected[rows] = own.detach()
    replaced = _ReplaceRows.apply(y, own, rows)
    assert torch.equal(replaced, expected) and torch.equal(y, before)
    assert torch.autograd.gradcheck(_ReplaceRows.apply, (y, own, rows))
    replaced.backward(grad_y)
    assert (grad_y == 1).all()  # the gradient may be somebody else's too
