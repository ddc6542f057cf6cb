"""Is LoRA what its docstring says: how many numbers, zero at the start, every user's own draw?"""

import math

import pytest
import torch

from minipeft.bank import SPAN
from minipeft.errors import InputError
from minipeft.methods.lora import LoRA
from minipeft.methods.method import Residents, Share
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft_kernels.backend import backend
from minipeft_kernels.segments import Segments
from minipeft_kernels.wgrad import num_squares

BASE = Decoder(DecoderConfig(vocab_size=60, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                             mlp_width=75))  # fmt: skip
SITES = BASE.sites


def used(method, row):
    """The numbers of a row that the method trains, as one vector, and all others."""
    layout, mine = method.layout(BASE), torch.zeros(len(row), dtype=torch.bool)
    for name in layout.shapes:
        layout.view(mine, name)[: method.rank] = True
    return row[mine], row[~mine]


@pytest.mark.parametrize("rank", [1, 3, 8, 12, 16])
def test_number_of_trained_numbers(rank):
    method = LoRA(rank)
    # q and o 32 x 32, k and v 32 x 16, gate and up 32 x 75, down 75 x 32, in two layers
    assert method.count(BASE) == 2 * rank * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 75))
    trained, _ = used(method, torch.zeros(method.layout(BASE).row_size))
    assert len(trained) == method.count(BASE)


@pytest.mark.parametrize("rank, rank_class", [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_rank_class_is_the_next_power_of_two_from_eight(rank, rank_class):
    assert LoRA(rank).rank_class() == rank_class


def test_layout_is_rank_major_and_padded_to_the_rank_class():
    layout = LoRA(3, sites=("k", "down")).layout(BASE)
    assert layout.shapes == {
        "layers.0.attn.k.A": (8, 32), "layers.0.attn.k.Bt": (8, 16),
        "layers.0.mlp.down.A": (8, 75), "layers.0.mlp.down.Bt": (8, 32),
        "layers.1.attn.k.A": (8, 32), "layers.1.attn.k.Bt": (8, 16),
        "layers.1.mlp.down.A": (8, 75), "layers.1.mlp.down.Bt": (8, 32),
    }  # fmt: skip
    assert all(offset % SPAN == 0 for offset in layout.offsets.values())


@pytest.mark.parametrize("rank", [1, 12])
def test_start_is_a_uniform_and_b_zero_so_the_update_is_zero(rank):
    method = LoRA(rank)
    layout, row = method.layout(BASE), method.initial_row(BASE, 0, "ann")
    assert row.dtype == torch.float32 and row.shape == (layout.row_size,)
    for site, (K, _) in SITES.items():
        A, Bt = layout.view(row, f"{site}.A"), layout.view(row, f"{site}.Bt")
        assert not (Bt.T @ A).any() and not Bt.any() and not A[rank:].any()
        bound = 1 / math.sqrt(K)
        assert A[:rank].abs().max() <= bound and A[:rank].max() > 0.7 * bound and A[:rank].min() < -0.7 * bound
        # A uniform draw's standard deviation is bound / sqrt 3; six standard errors of it.
        assert abs(float(A[:rank].std()) * math.sqrt(3) / bound - 1) < 6 / math.sqrt(rank * K)
    assert not used(method, row)[1].any()


def test_start_is_a_function_of_seed_user_and_site():
    method = LoRA(4)
    row = method.initial_row(BASE, 0, "ann")
    assert torch.equal(row, LoRA(4, alpha=1.0).initial_row(BASE, 0, "ann"))
    assert not torch.equal(row, method.initial_row(BASE, 1, "ann"))
    assert not torch.equal(row, method.initial_row(BASE, 0, "bob"))
    fewer = LoRA(4, sites=("up", "q"))
    other = fewer.initial_row(BASE, 0, "ann")
    for name in fewer.layout(BASE).shapes:  # which other sites are chosen does not matter
        assert torch.equal(fewer.layout(BASE).view(other, name), method.layout(BASE).view(row, name)), name
    A = [method.layout(BASE).view(row, f"layers.{i}.attn.q.A") for i in (0, 1)]
    assert not torch.equal(*A)


def test_sites_are_picked_by_last_words_or_full_name():
    assert list(LoRA(sites=("q", "v")).chosen(BASE)) == [f"layers.{i}.attn.{s}" for i in (0, 1) for s in ("q", "v")]
    assert list(LoRA(sites=("layers.1.mlp.up",)).chosen(BASE)) == ["layers.1.mlp.up"]
    assert list(LoRA(sites=("mlp.up",)).chosen(BASE)) == ["layers.0.mlp.up", "layers.1.mlp.up"]
    assert LoRA(sites=("v", "q")).layout(BASE).shapes == LoRA(sites=("q", "v")).layout(BASE).shapes
    assert LoRA().chosen(BASE) == SITES
    for name in ("p", "1.mlp.upper", "up.layers"):  # no part of a word
        with pytest.raises(InputError, match=f"no site of this base is called '{name}'"):
            LoRA(sites=("q", name)).check(BASE)


def test_rank_is_at_most_the_width():
    LoRA(16).check(BASE)
    LoRA(32, sites=("q", "gate")).check(BASE)
    with pytest.raises(InputError, match=r"LoRA rank 17 is above the width of layers.0.attn.k \(32 in, 16 out\)"):
        LoRA(17).check(BASE)


def test_ranks_that_kernels_do_not_take_are_refused_where_they_run(device):
    base = Decoder(DecoderConfig(vocab_size=8, width=272, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=272,
                                 mlp_width=8)).to(device)  # fmt: skip
    LoRA(256, sites=("q",)).check(base)
    if backend(device) == "torch":
        LoRA(257, sites=("q",)).check(base)
    else:
        with pytest.raises(InputError, match=r"LoRA rank 257 at layers.0.attn.q: on a GPU ranks are at most 256"):
            LoRA(257, sites=("q",)).check(base)


def at(bank, sites, segments):
    return bank.actors[0].loras_of(Share(bank, 0, segments, None, None, None, None, None)).get(sites)


def test_bank_holds_each_slots_scale_and_rank():
    bank = Residents(LoRA(8), BASE, 3, "cpu", torch.float32)
    for user, method in [("a", LoRA(8, 16.0)), ("b", LoRA(3, 4.0)), ("c", LoRA(1, 0.5))]:
        bank.admit(user, method, method.initial_row(BASE, 0, user), 0)
    scale, ranks, _ = bank.actors[0].settings["layers.0.attn.q"]
    torch.testing.assert_close(scale, torch.tensor([2.0, 4 / 3, 0.5]))
    assert ranks.tolist() == [8, 3, 1]
    bank.bank.evict(1)
    assert bank.admit("d", LoRA(5, 5.0), torch.zeros(bank.bank.layout.row_size), 0) == 1
    assert scale[1] == 1.0 and ranks[1] == 5


def test_bank_acts_where_the_method_does_and_on_views_of_its_rows():
    bank, segments = Residents(LoRA(3, sites=("q",)), BASE, 2, "cpu", torch.float32), Segments.build([1], [16])
    bank.admit("a", LoRA(8), torch.zeros(bank.bank.layout.row_size), 0)
    bank.admit("b", LoRA(3), torch.zeros(bank.bank.layout.row_size), 0)
    assert at(bank, ("layers.0.attn.k",), segments) is None
    lora = at(bank, ("layers.1.attn.q",), segments)
    assert lora.segments is segments and lora.ranks.tolist() == [8, 3]
    assert at(bank, ("layers.1.attn.q",), Segments.build([0], [16])).ranks is None  # nothing to mask
    bank.bank.weights[1] = 1.0
    bank.bank.grads[1] = 2.0
    (Bt,), (grad_Bt,) = lora.Bts, lora.grad_Bts
    assert lora.A.shape == (2, 8, 32) and Bt.shape == (2, 8, 32)
    assert (lora.A[1] == 1).all() and (Bt[1] == 1).all() and not lora.A[0].any()
    assert (lora.grad_A[1] == 2).all() and (grad_Bt[1] == 2).all() and not grad_Bt[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_are_as_many_sums_of_squares_as_kernels_write(kernels, dtype):
    base = Decoder(DecoderConfig(vocab_size=8, width=272, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=272,
                                 mlp_width=8)).to(kernels, dtype)  # fmt: skip
    residents = Residents(LoRA(8, sites=("q",)), base, 2, kernels, dtype)
    (view,) = residents.actors[0].loras.values()
    for part, matrices in zip(view["squares"], (view["grad_A"], *view["grad_Bts"]), strict=True):
        assert part.shape[1] == num_squares(matrices.shape[1], matrices.shape[2], dtype.itemsize)
    assert residents.squares.shape[1] == sum(part.shape[1] for part in view["squares"])


def test_sites_of_one_input_are_one_view_where_their_matrices_have_no_gap():
    method = LoRA(8, sites=("q", "v", "gate", "up", "o"))
    bank, segments = Residents(method, BASE, 2, "cpu", torch.float32), Segments.build([1], [16])
    row = torch.arange(float(bank.bank.layout.row_size))
    bank.admit("a", method, row, 0)
    q, v = "layers.1.attn.q", "layers.1.attn.v"
    lora = at(bank, (q, v), segments)
    view = method.layout(BASE).view
    assert torch.equal(lora.A[0], torch.cat([view(row, f"{site}.A") for site in (q, v)]))
    assert all(torch.equal(Bt[0], view(row, f"{site}.Bt")) for Bt, site in zip(lora.Bts, (q, v)))
    assert at(bank, (q, "layers.1.attn.k", v), segments) is None  # it does not act at k
    assert at(bank, (q, "layers.1.attn.o"), segments) is None  # o has another input
    assert at(bank, ("layers.1.mlp.gate", "layers.1.mlp.up"), segments) is None  # 8 * 75 is no multiple of SPAN
