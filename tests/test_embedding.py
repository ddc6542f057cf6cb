"""Is the gradient of an embedding's update the sum over its token's rows, to the bit on every run?"""

import numpy as np
import pytest
import torch

from minipeft.methods.embedding import _Gather


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def grad_of(tokens, slot_of_row, grad_v, num_slots, vocab_size):
    """grad_At [U, vocabulary, R] after a pass; of slots without rows what was there, ones."""
    At = torch.zeros(num_slots, vocab_size, grad_v.shape[1], dtype=grad_v.dtype)
    grad_At, anchor = torch.ones_like(At), torch.zeros((), requires_grad=True)
    v = _Gather.apply(anchor, At, grad_At, slot_of_row.unique(), slot_of_row, tokens)
    v.backward(grad_v)
    return grad_At


def test_sums_are_right_and_the_same_to_the_bit_on_two_threads(two_threads):
    torch.manual_seed(0)
    T, R, U, vocab_size = 8192, 16, 3, 100
    slot_of_row = torch.from_numpy(np.repeat([2, 0], [T - 100, 100]))  # slot 1 has no rows
    tokens, grad_v = torch.randint(vocab_size - 1, (T,)), torch.randn(T, R)
    grads = [grad_of(tokens, slot_of_row, grad_v, U, vocab_size) for _ in range(30)]
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    exact = torch.zeros(U, vocab_size, R, dtype=torch.float64)
    for slot, token, row in zip(slot_of_row.tolist(), tokens.tolist(), grad_v.double()):
        exact[slot, token] += row
    exact[1] = 1.0
    torch.testing.assert_close(grads[0].double(), exact, rtol=0, atol=1e-4)
    assert torch.equal(grads[0][[0, 2], -1], torch.zeros(2, R)), "a token that nobody has"


def test_no_rows_leave_every_slot_alone():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(grad_of(nothing, nothing, torch.zeros(0, 4), 2, 5), torch.ones(2, 5, 4))
