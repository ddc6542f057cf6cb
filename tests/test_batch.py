"""Does a packed batch hold every user's sequences, whole tiles of their own, and the rows that are read?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.batch import Part, Read, filled, pack
from minipeft_kernels.segments import TILE

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
OWNERS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=6, unique=True)


def make_parts(owners, lengths):
    """Parts of these (bank, slot), every token another; each sequence reads from one row up to all."""
    parts, token = [], 1
    for i, (bank, slot) in enumerate(sorted(owners)):
        reads = []
        for n in lengths[i % len(lengths) :] or lengths:
            reads.append(Read(tuple(range(token, token + n)), 1 + token % n))
            token += n
        parts.append(Part(bank, slot, reads))
    return parts


@settings(derandomize=True, max_examples=60, deadline=None)
@given(owners=OWNERS, lengths=LENGTHS)
def test_every_user_has_whole_tiles_and_nothing_is_lost(owners, lengths):
    parts = make_parts(owners, lengths)
    batch = pack(parts)
    expected, positions, starts, real = [], [], [], 0
    for part in parts:
        starts.append(len(expected))
        mine = [token for read in part.reads for token in read.tokens]
        real += len(mine)
        filler = part.num_rows - len(mine)
        assert part.num_rows == filled(len(mine)) and part.num_rows % TILE == 0 and 0 <= filler < TILE
        expected += mine + [0] * filler
        positions += [i for read in part.reads for i in range(len(read.tokens))]
        positions += range(filler)  # the filler is a sequence of its own: it sees nothing and nothing sees it
    assert batch.rows.tokens.tolist() == expected and batch.rows.positions.tolist() == positions
    assert batch.num_real_rows == real

    owned = [(part.bank, part.slot, start) for part, start in zip(parts, starts)]
    in_groups = []
    for bank, first_row, segments in ((group.bank, group.first_row, group.segments) for group in batch.groups):
        assert not segments.tiles.ragged  # whole tiles need no copy
        in_groups += [(bank, slot, first_row + start) for slot, start in zip(segments.slots, segments.starts)]
    assert in_groups == owned
    assert len({group.bank for group in batch.groups}) == len(batch.groups)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(owners=OWNERS, lengths=LENGTHS)
def test_the_rows_that_are_read_are_the_last_of_each_sequence(owners, lengths):
    parts = make_parts(owners, lengths)
    batch = pack(parts)
    read = batch.rows.tokens[batch.head_rows[batch.read]].tolist()
    assert read == [t for part in parts for r in part.reads for t in r.tokens[-r.num_read :]]
    # Head rows too come in whole tiles of one user.
    assert len(batch.head_rows) == sum(filled(sum(r.num_read for r in part.reads)) for part in parts)
    owner = torch.cat([torch.full((part.num_rows,), i) for i, part in enumerate(parts)])
    tiles = owner[batch.head_rows].view(-1, TILE)
    assert (tiles == tiles[:, :1]).all()


def test_filled():
    assert [filled(n) for n in (0, 1, 15, 16, 17, 32)] == [0, 16, 16, 16, 32, 32]


@pytest.mark.parametrize("owners", [[(0, 1), (0, 0)], [(1, 0), (0, 0)], [(0, 0), (0, 0)]])
def test_parts_come_sorted_one_per_user(owners):
    with pytest.raises(ValueError, match="parts must be sorted by bank and slot, one each"):
        pack([Part(bank, slot, [Read((1,), 1)]) for bank, slot in owners])


def test_a_user_without_rows_is_an_error():
    with pytest.raises(ValueError, match="bank 2, slot 3 has no rows"):
        pack([Part(0, 0, [Read((1,), 1)]), Part(2, 3, [])])


@pytest.mark.parametrize("tokens", [(), (7,)])
def test_a_read_cannot_reach_into_the_sequence_before(tokens):
    with pytest.raises(ValueError, match=f"slot 1 reads 2 rows of a sequence of {len(tokens)}"):
        pack([Part(0, 0, [Read((1, 2, 3), 1)]), Part(0, 1, [Read(tokens, 2)])])
