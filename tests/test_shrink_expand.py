"""Do the shrink and expand kernels give the same bits split or not, and read and write nothing but their own?"""

import inspect
import math
import sys
from itertools import product

import pytest
import torch
from accuracy import assert_as_accurate
from test_segment_lora import make_inputs

from minipeft_kernels import reference, shrink_expand
from minipeft_kernels.blocks import MOST_RANKS
from minipeft_kernels.shrink_expand import can_join, configuration, site_table


@pytest.mark.parametrize("R", [1, 8, 16, 40, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_and_row_fused_give_the_same_bits(kernels, R, dtype):
    K = 2 * shrink_expand.plane() + 44  # the third plane is no whole one, nor whole blocks
    x, A, Bt, scale, segments, ranks, _ = make_inputs([33, 0, 1, 20], kernels, R >= 3, dtype, R=R, sizes=(K, 200))
    drop = torch.tensor([[1, 30], [2, 0], [3, 0], [4, 128]], device=kernels)
    results = []
    for split in (False, True):
        y = torch.full((len(x), 200), math.nan, dtype=dtype, device=kernels)  # poisoned: every number must be written
        v = shrink_expand.shrink_expand(x, A, Bt, y, scale, ranks, segments.plan, drop_x=drop, drop_y=drop, split=split)
        results.append((v, y))
    (v, y), (split_v, split_y) = results
    assert torch.isfinite(y).all() and torch.isfinite(v).all() and y.any()
    assert torch.equal(v, split_v) and torch.equal(y, split_y)


@pytest.mark.parametrize("split", [False, True])
def test_sites_side_by_side_are_the_sites_one_by_one(kernels, split):
    widths, R, K = (128, 256, 128), 8, 40
    draw = torch.Generator().manual_seed(0)
    x, A, _, scale, segments, ranks, _ = make_inputs([20, 17, 0, 1], kernels, R=3 * R, sizes=(K, 1), mixed_ranks=False)
    ranks = torch.tensor([(1, 8, 5)[u % 3] for u in range(len(A))], dtype=torch.int32, device=kernels)
    bank = torch.randn(len(A), R * sum(widths), generator=draw).to(kernels)
    Bts = [Bt.unflatten(1, (R, -1)) for Bt in bank.split([R * width for width in widths], dim=1)]
    y = torch.full((len(x), sum(widths)), math.nan, device=kernels)
    sites = site_table(widths, 3 * R, y.dtype, kernels)
    shrink_expand.shrink_expand(x, A, Bts[0], y, scale, ranks, segments.plan, sites, split=split)
    for m, (part, Bt) in enumerate(zip(y.split(widths, dim=1), Bts)):
        inputs = (x.cpu(), A[:, m * R : (m + 1) * R].cpu(), Bt.cpu(), scale.cpu(), segments, ranks.cpu())
        exact = reference.segment_lora(*(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
                                         for t in inputs))  # fmt: skip
        assert_as_accurate(f"site {m}", part, reference.segment_lora(*inputs), exact)


def test_a_user_of_rank_zero_gets_exactly_nothing(kernels):
    x, A, Bt, scale, segments, ranks, _ = make_inputs([20, 17], kernels)
    ranks[int(segments.slots[0])] = 0
    A[int(segments.slots[0])] = math.nan
    y = torch.full((37, Bt.shape[2]), math.nan, device=kernels)
    shrink_expand.shrink_expand(x, A, Bt, y, scale, ranks, segments.plan)
    assert not y[:20].any() and y[20:].all()


def test_a_number_that_kernels_are_compiled_with_is_in_their_source():
    """Triton keeps compiled kernels on disk by their source. It hashes numbers outside of it where kernels read them
    as tl.constexpr, not where a constexpr_function does: with another number there it would load the old kernel."""
    files = [file for name, file in sys.modules.items() if name.startswith("minipeft_kernels.")]
    functions = {name: value for file in files for name, value in vars(file).items()
                 if isinstance(value, type(shrink_expand.plane))}  # fmt: skip
    assert {"plane", "padded", "columns"} <= functions.keys()
    for name, function in functions.items():
        assert not inspect.getclosurevars(function.fn).globals, name


def test_block_sizes_are_what_the_kernels_can_take():
    for num_ranks, itemsize in product(range(1, MOST_RANKS + 1), (2, 4)):
        config = configuration(num_ranks, itemsize)
        assert shrink_expand.plane() % config["BLOCK"] == 0 and config["BLOCK"] % 16 == 0
        assert config["BLOCK_T"] in (16, 32, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_widths_of_whole_blocks_can_be_joined(dtype):
    block = configuration(24, dtype.itemsize)["BLOCK"]
    assert can_join([block, 3 * block], 24, dtype) and not can_join([block, block + 16], 24, dtype)
    assert can_join([5], 8, dtype) and site_table([5], 8, dtype, "cpu") is None
    with pytest.raises(ValueError, match=f"site_table: sites of .* each must be a multiple of {block}"):
        site_table([block, block + 16], 24, dtype, "cpu")
    table = site_table([block, 2 * block], 24, dtype, "cpu").tolist()
    assert table == [[0, 0, block], [1, block, 2 * block], [1, block, 2 * block]]


def test_sites_of_more_rank_rows_than_a_program_takes_are_launched_one_by_one():
    widths = [256, 256, 256]
    assert can_join(widths, MOST_RANKS, torch.bfloat16) and not can_join(widths, MOST_RANKS + 1, torch.bfloat16)
    with pytest.raises(ValueError, match="3 sites of 384 rank rows in all cannot share a launch, which takes 256"):
        site_table(widths, 384, torch.bfloat16, "cpu")
