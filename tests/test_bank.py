"""Is a user one row, with every parameter a view of it, and is a slot clean when the next user gets it?"""

import pytest
import torch

from minipeft.bank import SPAN, Bank, Layout

SHAPES = {"q.A": (3, 20), "q.Bt": (3, 7), "scale": (5,), "head": (64,)}  # 60, 21, 5 and 64 numbers


def make_tensors(layout, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in layout.shapes.items()}


def test_every_parameter_starts_at_a_multiple_of_the_span():
    layout = Layout(SHAPES)
    assert layout.offsets == {"q.A": 0, "q.Bt": 64, "scale": 128, "head": 192}
    assert layout.row_size == 256 and SPAN == 64
    assert Layout({}).row_size == 0


def test_row_and_tensors_undo_each_other_bit_for_bit():
    layout = Layout(SHAPES)
    tensors = make_tensors(layout)
    row = layout.row(tensors)
    assert row.shape == (256,) and int((row != 0).sum()) == 60 + 21 + 5 + 64  # zeros between the spans
    back = layout.tensors(row)
    assert list(back) == list(SHAPES) and all(torch.equal(back[name], tensors[name]) for name in SHAPES)
    back["scale"][0] = 9.0
    assert row[128] == 9.0  # views, not copies


def test_a_parameter_of_all_users_is_a_view_with_the_row_between_slots():
    layout = Layout(SHAPES)
    rows = torch.stack([layout.row(make_tensors(layout, seed)) for seed in range(4)])
    view = layout.view(rows, "q.Bt")
    assert view.shape == (4, 3, 7) and view.stride() == (layout.row_size, 7, 1)
    assert view.data_ptr() == rows.data_ptr() + 64 * 4
    assert torch.equal(view[2], make_tensors(layout, 2)["q.Bt"])


def test_a_row_needs_exactly_its_parameters():
    layout = Layout(SHAPES)
    tensors = make_tensors(layout)
    with pytest.raises(ValueError, match=r"needs parameters .*'q\.A'.*, got"):
        layout.row({name: tensor for name, tensor in tensors.items() if name != "q.A"})
    with pytest.raises(ValueError, match="needs parameters"):
        layout.row({**tensors, "k.A": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"q.A must be \(3, 20\), got \(1, 20\)"):
        layout.row({**tensors, "q.A": torch.zeros(1, 20)})  # would broadcast


def test_admitting_clears_what_the_last_user_left_and_touches_nobody_else():
    layout = Layout(SHAPES)
    bank, rows = Bank(layout, 3), [layout.row(make_tensors(layout, seed)) for seed in range(3)]
    assert [bank.admit(user, row) for user, row in zip("abc", rows)] == [0, 1, 2]
    for buffer in (bank.grads, bank.exp_avg, bank.exp_avg_sq):
        buffer.fill_(5.0)
    bank.evict(1)
    assert bank.users == ["a", None, "c"] and torch.equal(bank.weights[1], rows[1])
    assert bank.admit("d", rows[0]) == 1
    assert bank.users == ["a", "d", "c"]
    assert torch.equal(bank.weights, torch.stack([rows[0], rows[0], rows[2]]))
    for buffer in (bank.grads, bank.exp_avg, bank.exp_avg_sq):
        assert buffer.shape == (3, 256) and (buffer[[0, 2]] == 5.0).all() and not buffer[1].any()


def test_slots_are_given_once():
    layout = Layout(SHAPES)
    bank, row = Bank(layout, 2), torch.zeros(256)
    bank.admit("a", row)
    with pytest.raises(ValueError, match="'a' already has slot 0"):
        bank.admit("a", row)
    with pytest.raises(ValueError, match=r"the row must have 256 numbers, got \(1,\)"):
        bank.admit("b", row[:1])  # would broadcast
    assert bank.users == ["a", None]
    bank.admit("b", row)
    with pytest.raises(ValueError, match="all 2 slots are taken; evict a user first"):
        bank.admit("c", row)
    bank.evict(0)
    with pytest.raises(ValueError, match="slot 0 is already free"):
        bank.evict(0)
