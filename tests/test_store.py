"""Does every adapter come back bit for bit, whoever the user is, and is whatever is broken noticed and named?"""

import math
import os
import random
import resource
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import OrderedDict, namedtuple
from contextlib import suppress
from dataclasses import replace
from enum import IntEnum
from json import loads
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minipeft import archive, shards
from minipeft import store as store_module
from minipeft.engine import Adapter
from minipeft.errors import InputError
from minipeft.files import folder_name, write_file
from minipeft.index import Index, only_writer
from minipeft.methods.lora import LoRA
from minipeft.methods.stack import Stack
from minipeft.methods.vera import VeRA
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import Origin
from minipeft.packing import put_together, take_apart
from minipeft.shards import decoded, encoded
from minipeft.store import Store
from minipeft.tasks.task import Header

CONFIG = DecoderConfig(vocab_size=60, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=75)
BASE = Decoder(CONFIG)
TASK = Header("moods", "Do they like it?", ("yes", "no"))
METRICS = {"best_epoch": 2, "epochs": 3, "steps": 12, "val_loss": [1.5, 0.1 + 0.2, math.nan], "stopped_early": True,
           "skipped_steps": 0}  # fmt: skip
DANGEROUS = {"path": "../../x", "absolute": "/etc/passwd", "dot": ".", "dots": "..", "three dots": "...", "empty": "",
             "nul": "a\0b", "emoji": "👩‍🚀", "newline": "a\nb", "percent": "%2E", "only percent": "%", "space": " ",
             "backslash": "..\\x", "hidden": ".bashrc", "suffix": "x.safetensors", "tmp": "x.tmp", "dash": "-rf",
             "right to left": "\u202eabc", "star": "*", "combining": "e\u0301", "composed": "\u00e9",
             "sql": "'; DROP TABLE adapters; --", "long": "x" * 10_000, "long too": "x" * 9_999 + "y",
             "long emoji": "👩" * 2_500, "index": "index.sqlite", "last": "\U0010ffff", "list": "users.jsonl",
             "list half written": "users.123.tmp"}  # fmt: skip


def make_adapter(user="ann", method=None, seed=0):
    """Numbers of every size, of both signs, the smallest too; zero where the method trains nothing."""
    method, draw = method or LoRA(3, 7.0, ("q", "down")), torch.Generator().manual_seed(seed)
    layout = method.layout(BASE)
    tensors = {}
    for name, shape in layout.shapes.items():
        tensors[name] = torch.zeros(shape)
        size = torch.exp(20 * torch.randn(method.rank, shape[1], generator=draw).clamp(-4, 4))
        tensors[name][: method.rank] = size * torch.randn(method.rank, shape[1], generator=draw)
        tensors[name][0, 0], tensors[name][0, 1] = 1e-45, -0.0
    return Adapter(user, method, layout.row(tensors), METRICS)


def bits(row):
    return row.view(torch.int32)


def same(found, expected):
    """To the bit, metrics and what lies under included."""
    assert found.user == expected.user and found.method == expected.method
    assert torch.equal(bits(found.row), bits(expected.row))
    assert repr(found.metrics) == repr(expected.metrics)
    assert (found.under is None) == (expected.under is None)
    if found.under:
        same(found.under, expected.under)
    return True


def loaded(seed=0, name="base"):
    """A base that says it came from a folder."""
    base = Decoder(CONFIG)
    with torch.no_grad():
        for weight in base.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    base.origin = Origin(f"/models/{name}", name, base)
    return base


@pytest.fixture
def base():
    return loaded()


@pytest.fixture
def store(tmp_path, base):
    return Store.make(tmp_path / "new" / "store", base, TASK)


def shard_files(store):
    return sorted((store.folder / "shards").iterdir())


def no_waiting(monkeypatch):
    """Every add makes a shard."""
    monkeypatch.setattr(archive, "MAX_WAITING", 0)


# ---- There and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_waiting", [0, 4 << 20], ids=["in shards", "waiting in the index"])
def test_a_store_gives_back_what_was_added_and_says_whose_it_is(max_waiting, store, base, monkeypatch):
    """Any text is a safe id; what lies under several is kept once, and is one object."""
    monkeypatch.setattr(archive, "MAX_WAITING", max_waiting)
    everyone = make_adapter("(everyone)", seed=9)
    adapters = [replace(make_adapter(user, seed=i), under=everyone if i % 2 else None)
                for i, user in enumerate(DANGEROUS.values())]  # fmt: skip
    store.add_many(adapters[:9], base)
    for adapter in adapters[9:]:
        store.add(adapter, base)
    again = Store(store.folder)
    assert again.task == TASK and again.base == store.base and again.base.name == "base"
    assert again.users() == sorted(DANGEROUS.values()) == [user for user, _ in again.everybody()]
    random.Random(0).shuffle(adapters)
    found = again.get_many([adapter.user for adapter in adapters], base)
    assert all(map(same, found, adapters))
    assert len({id(adapter.under) for adapter in found if adapter.under}) == 1
    for adapter in adapters:
        assert adapter.user in again and again.about(adapter.user)[::2] == (adapter.method, 1)
        assert same(again.get(adapter.user, base), adapter)
    assert "nobody" not in again and store.verify() == []
    assert {path.name for path in store.folder.parent.iterdir()} == {"store"}
    assert {path.name for path in store.folder.iterdir()} <= {"index.sqlite", "index.sqlite-wal", "index.sqlite-shm",
                                                              "shards", "writer.lock"}  # fmt: skip


@pytest.mark.parametrize("method", [
    LoRA(), LoRA(1, 0.1, ("k",)), LoRA(12, 16.0, ("layers.1.mlp.gate", "v")), LoRA(3, sites=("embed", "o")),
    VeRA(rank=5), Stack((LoRA(3, sites=("q",)), VeRA(rank=7, sites=("v",)))),
], ids=lambda method: method.name)  # fmt: skip
def test_a_row_is_kept_without_its_padding(method, store, base, monkeypatch):
    no_waiting(monkeypatch)
    tensors = method.tensors(method.initial_row(base, 0, "ann"), base)
    draw = torch.Generator().manual_seed(0)
    row = method.row({name: torch.randn(x.shape, generator=draw) for name, x in tensors.items()}, base)
    store.add(Adapter("ann", method, row, METRICS), base)
    assert torch.equal(bits(store.get("ann", base).row), bits(row))
    (file,) = shard_files(store)
    (kept,) = load_file(file)["rows"]  # any library reads it
    assert torch.equal(kept, row[row != 0]) and len(kept) == method.count(base)


def test_adapters_over_different_shared_ones_keep_their_own(tmp_path):
    base = loaded()
    store = Store.make(tmp_path, base, TASK)
    for seed in (1, 2):
        store.add(replace(make_adapter(f"user {seed}"), under=make_adapter("(everyone)", seed=seed)), base)
    for seed in (1, 2):
        expected = make_adapter("(everyone)", seed=seed).row
        assert torch.equal(bits(store.get(f"user {seed}", base).under.row), bits(expected))


def test_what_lies_under_may_have_nothing_under_it(store, base):
    below = replace(make_adapter("below"), under=make_adapter("lowest"))
    with pytest.raises(InputError, match="'below' lies under another and on a third; one level is kept"):
        store.add(replace(make_adapter(), under=below), base)
    assert store.users() == []


def test_adding_again_replaces_and_counts(store, base, monkeypatch):
    for max_waiting in (4 << 20, 0, 4 << 20):  # in the index, in a shard, in the index again
        monkeypatch.setattr(archive, "MAX_WAITING", max_waiting)
        for seed, method in ((1, None), (2, LoRA(2))):
            newer = make_adapter(seed=seed, method=method)
            store.add(newer, base)
            assert same(store.get("ann", base), newer) and store.users() == ["ann"]
    assert store.about("ann").version == 6
    for method in (None, LoRA(2)):
        with pytest.raises(InputError, match="user 'ann' is twice in one batch; add one adapter of each"):
            store.add_many([make_adapter(seed=7), make_adapter("bob"), make_adapter(seed=8, method=method)], base)
    assert same(store.get("ann", base), newer) and store.users() == ["ann"] and store.verify() == []


def test_single_adapters_wait_and_then_share_a_shard(store, base, monkeypatch):
    row_bytes = 4 * make_adapter().method.count(base)
    monkeypatch.setattr(archive, "MAX_WAITING", 5 * row_bytes)
    adapters = [make_adapter(f"user {i}", seed=i) for i in range(13)]
    for i, adapter in enumerate(adapters):
        store.add(adapter, base)
        assert len(shard_files(store)) == (i + 1) // 6
    for adapter in adapters:
        assert same(Store(store.folder).get(adapter.user, base), adapter)
    other = make_adapter("user 3", seed=99)
    store.add(other, base)  # it was in a shard and now waits
    assert same(store.get("user 3", base), other) and store.verify() == []


def test_a_large_batch_is_cut_into_shards(store, base, monkeypatch):
    no_waiting(monkeypatch)
    row_bytes = 4 * make_adapter().method.count(base)
    monkeypatch.setattr(archive, "MAX_BYTES", 3 * row_bytes + 1)
    adapters = [make_adapter(f"user {i}", seed=i) for i in range(10)]
    store.add_many(adapters, base)
    assert [load_file(file)["rows"].shape[0] for file in shard_files(store)] == [3, 3, 3, 1]
    assert all(map(same, store.get_many([a.user for a in adapters], base), adapters))
    monkeypatch.setattr(archive, "MAX_BYTES", 1)  # a row larger than a shard has one of its own
    store.add_many([make_adapter(f"more {i}", seed=i) for i in range(2)], base)
    assert len(shard_files(store)) == 6 and same(store.get("more 1", base), make_adapter("more 1", seed=1))


def test_users_of_many_methods_share_a_store(store, base):
    methods = [LoRA(rank, sites=("q",)) for rank in (1, 2, 9)] + [VeRA(rank=4)]
    adapters = [Adapter(f"user {i}", methods[i % 4], methods[i % 4].initial_row(base, i, "x"), {"n": i, "of": []})
                for i in range(20)]  # fmt: skip
    store.add_many(adapters, base)
    assert all(map(same, store.get_many([a.user for a in adapters[::-1]], base), adapters[::-1]))
    with pytest.raises(ValueError, match=r"a lora row must be \[\d+\] fp32, got \(3,\)"):
        store.add(replace(adapters[0], row=torch.zeros(3)), base)
    assert store.verify() == []


JSON = st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)  # fmt: skip


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_metrics_come_back_as_they_were(metrics):
    skeleton, codes, numbers = take_apart(metrics)
    assert repr(put_together(skeleton, codes, numbers)) == repr(metrics)
    for wrong in (numbers + b"x", numbers[:-1]):
        if wrong != numbers:
            with pytest.raises(ValueError):
                put_together(skeleton, codes, wrong)


def test_metrics_that_json_cannot_hold_are_an_error(store, base):
    endless = []
    endless.append(endless)
    for metrics in ({"x": {1, 2}}, {"x": 1 << 64}, {"x": list(range(70_000))}, {1: 2}, [1, 2], {"x": endless}):
        with pytest.raises(InputError, match="metrics"):
            store.add(replace(make_adapter(), metrics=metrics), base)
    assert store.users() == []


def test_metrics_of_richer_types_come_back_as_what_json_has(store, base):
    level, point = IntEnum("Level", "LOW HIGH"), namedtuple("Point", "x y")
    store.add(replace(make_adapter(), metrics=OrderedDict(a=level.HIGH, b=point(1, 2.5), c=np.float64(0.1), d=True)),
              base)  # fmt: skip
    assert repr(store.get("ann", base).metrics) == "{'a': 2, 'b': [1, 2.5], 'c': 0.1, 'd': True}"
    assert store.verify() == []


def test_verify_puts_metrics_together(store, base, monkeypatch):
    """What a writer got wrong has the right checksum."""
    monkeypatch.setattr(store_module, "take_apart", lambda metrics: ('{"x": 0}', "<", b""))
    store.add(make_adapter(), base)
    ((user, *_, what),) = store.verify()
    assert user == "ann" and "fewer numbers than places" in what


@pytest.mark.parametrize("rows, error", [("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_smaller_rows_err_as_they_say(rows, error, tmp_path, base, monkeypatch):
    no_waiting(monkeypatch)
    store = Store.make(tmp_path, base, TASK, rows=rows)
    method = LoRA(3, sites=("q", "down"))
    tensors = method.tensors(method.initial_row(base, 0, "ann"), base)
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(x.shape, generator=draw) * 10**i for i, (name, x) in enumerate(tensors.items())}
    tensors["layers.0.attn.q.B"].zero_()
    store.add(Adapter("ann", method, method.row(tensors, base), METRICS), base)
    found = method.tensors(Store(tmp_path).get("ann", base).row, base)
    for name, x in tensors.items():
        allowed = error * (x.abs() if rows == "bfloat16" else x.abs().max())
        assert ((found[name] - x).abs() <= allowed * (1 + 1e-6)).all()
        assert found[name].equal(x) == (x.count_nonzero() == 0)
    bytes_per_number = {"bfloat16": 2, "int8": 1}[rows]
    assert shard_files(store)[0].stat().st_size <= bytes_per_number * method.count(base) + 300
    assert store.verify() == [] and Store.make(tmp_path, base).rows == rows
    with pytest.raises(InputError, match=f"keeps rows as {rows}, not float32"):
        Store.make(tmp_path, base, rows="float32")
    with pytest.raises(InputError, match="rows 'fp4' are unknown; choose one of float32, bfloat16, int8"):
        Store.make(tmp_path / "other", base, rows="fp4")


def test_int8_keeps_the_sign_of_the_smallest_numbers_there_are():
    row = torch.tensor([128, -128, 64, 0]) * torch.tensor(2.0**-149)  # 128 / 127 of a unit, which is all a scale can be
    assert decoded(encoded(row, "int8", [4]).view(np.uint8), "int8", [4]).sign().equal(row.sign())


def test_an_int8_row_needs_finite_numbers(tmp_path, base):
    store, adapter = Store.make(tmp_path, base, rows="int8"), make_adapter()
    adapter.row[5] = math.nan
    with pytest.raises(InputError, match="NaN or infinite numbers has no int8 form"):
        store.add(adapter, base)


# ---- Bases, tasks and ids -------------------------------------------------------------------------------------------


def test_another_base_is_an_error_that_names_both(tmp_path):
    base, other = loaded(), loaded(seed=1, name="other")
    store = Store.make(tmp_path, base, TASK)
    store.add(make_adapter(), base)
    calls = (lambda: store.get("ann", other), lambda: store.add(make_adapter(), other),
             lambda: Store.make(tmp_path, other, TASK))  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match=r"belongs to base 'base' \(\w{12}\), not to 'other' \(\w{12}\); name the "
                                             "one that was in /models/base"):
            call()
    moved = loaded(name="renamed")  # the same numbers in another folder
    assert torch.equal(store.get("ann", moved).row, store.get("ann", base).row)
    with pytest.raises(InputError, match="came from no folder"):
        store.get("ann", BASE)


def test_another_task_is_an_error_and_no_task_takes_the_first(tmp_path):
    base = loaded()
    store = Store.make(tmp_path, base)
    with pytest.raises(InputError, match="does not say for which task its adapters are; import one with --task"):
        store.known_task()
    assert Store.make(tmp_path, base, TASK).task == TASK == Store.make(tmp_path, base).known_task()
    for changed, what in ((replace(TASK, labels=("no", "yes")), "labels"), (replace(TASK, instruction="?"), "instruc")):
        with pytest.raises(InputError, match=f"belongs to task 'moods'; 'moods' has other {what}"):
            Store.make(tmp_path, base, changed)
    assert Store.make(tmp_path, base, replace(TASK, name="renamed")).task == TASK


def test_an_id_must_be_text_of_some_length(store, base):
    store.add(make_adapter("x" * 65_536), base)
    for user, message in (("x" * 65_537, "has 65537 bytes; needed at most 65536"), ("\ud800", "half a character")):
        for call in (lambda: store.add(make_adapter(user), base), lambda: store.get(user, base)):  # noqa: B023
            with pytest.raises(InputError, match=message):
                call()
    assert len(store.users()) == 1


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=90), unique=True, max_size=6))
def test_folder_names_are_one_to_one_safe_and_short(users):
    names = {folder_name(user): user for user in (*users, *DANGEROUS.values())}
    assert len(names) == len({*users, *DANGEROUS.values()})
    for name, user in names.items():
        assert "/" not in name and "\0" not in name and name not in ("", ".", "..") and len(name.encode()) <= 200
        assert "%~" in name or unquote(name) == (user or "%")
        assert not name.startswith("users."), "users.jsonl lies beside them"


def test_deleting_forgets_one_user_and_compact_removes_the_numbers(store, base, monkeypatch):
    for max_waiting in (0, 4 << 20):
        monkeypatch.setattr(archive, "MAX_WAITING", max_waiting)
        store.add_many([make_adapter(user, seed=i) for i, user in enumerate(("ann of old", "bob", "cy"))], base)
        secret = make_adapter("ann of old", seed=0).row[:8].numpy().tobytes()
        store.delete("ann of old")
        assert "ann of old" not in store and store.users() == ["bob", "cy"]
        for call in (lambda: store.delete("ann of old"), lambda: store.get("ann of old", base),
                     lambda: store.about("ann of old")):  # fmt: skip
            with pytest.raises(InputError, match="no adapter of user 'ann of old' in "):
                call()
        if max_waiting == 0:
            assert any(secret in path.read_bytes() for path in shard_files(store))
        done = store.compact()
        assert done.erased and done.rows_removed == (1 if max_waiting == 0 else 2)
        for path in store.folder.rglob("*"):
            assert path.is_dir() or (secret not in path.read_bytes() and b"ann of old" not in path.read_bytes()), path
        assert same(store.get("cy", base), make_adapter("cy", seed=2)) and store.verify() == []


# ---- Compacting and other readers ------------------------------------------------------------------------------------


def crowded(store, base, monkeypatch, number=30):
    """Adapters in a shard each, of two methods, a third of them replaced, a third deleted."""
    no_waiting(monkeypatch)
    under = make_adapter("(everyone)", seed=99)
    kept = {}
    for i in range(number):
        method = LoRA(2, sites=("q",)) if i % 2 else None
        adapter = make_adapter(f"user {i:03d}", method, seed=i)
        kept[adapter.user] = replace(adapter, under=under if i % 5 == 0 else None)
        store.add(kept[adapter.user], base)
    for i in range(0, number, 3):
        kept[f"user {i:03d}"] = make_adapter(f"user {i:03d}", seed=1000 + i)
        store.add(kept[f"user {i:03d}"], base)
    for i in range(1, number, 3):
        store.delete(f"user {i:03d}")
        del kept[f"user {i:03d}"]
    return kept


def holds(store, base, kept):
    assert store.users() == sorted(kept)
    assert all(map(same, store.get_many(list(kept), base), kept.values()))
    return store.verify() == []


def test_compact_makes_few_full_shards_and_changes_nobody(store, base, monkeypatch):
    kept = crowded(store, base, monkeypatch)
    reader = Store(store.folder)
    assert same(reader.get("user 000", base), kept["user 000"])  # it has a shard mapped that goes away
    monkeypatch.setattr(archive, "MAX_BYTES", 7 * 4 * make_adapter().method.count(base))
    before = len(shard_files(store))
    done = Store(store.folder).compact()
    assert done.shards_before == before == 41 and done.rows_removed == 20
    assert done.shards_after == len(shard_files(store)) == 6
    assert holds(store, base, kept) and holds(reader, base, kept) and holds(Store(store.folder), base, kept)
    assert store.compact().shards_after == done.shards_after
    names = shard_files(store)
    store.compact()
    assert shard_files(store) == names, "full shards are left alone"
    for user in list(kept):
        store.delete(user)
    assert Store(store.folder).compact().shards_after == 0 and shard_files(store) == [] and reader.users() == []
    with sqlite3.connect(store.folder / "index.sqlite") as index:
        for table in ("adapters", "configurations", "forms"):
            assert index.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table


def test_a_reader_goes_on_while_rows_move(store, base, monkeypatch):
    """Whatever a writer does between a reader's look into the index and into the shard."""
    kept = crowded(store, base, monkeypatch, 6)
    reader, moves = Store(store.folder), []
    look = Index.entry

    def look_then_move(index, key):
        found = look(index, key)
        if index is reader._archive.index and len(moves) < 3:
            moves.append(store.compact() if len(moves) != 1 else store.add(kept["user 000"], base))
        return found

    monkeypatch.setattr(Index, "entry", look_then_move)
    assert same(reader.get("user 000", base), kept["user 000"]) and len(moves) == 2
    monkeypatch.setattr(Index, "entry", lambda index, key: look(index, key) if index is store._archive.index or moves
                        else None)  # fmt: skip
    moves.clear()
    with pytest.raises(InputError, match="no adapter of user 'user 000'"):
        reader.get("user 000", base)


def test_a_replaced_row_that_waits_is_looked_up_again(store, base, monkeypatch):
    """The entry was read before, the row after somebody replaced it: no false alarm."""
    reader = Store(store.folder)
    store.add(make_adapter(seed=1), base)
    row, newer = Index.waiting_row, make_adapter(seed=2)
    replaced = []

    def replace_then_read(index, key):
        if not replaced:
            replaced.append(store.add(newer, base))
        return row(index, key)

    monkeypatch.setattr(Index, "waiting_row", replace_then_read)
    assert same(reader.get("ann", base), newer)


@pytest.mark.parametrize("max_waiting", [0, 4 << 20], ids=["in shards", "waiting in the index"])
@pytest.mark.parametrize("ask", ["get", "get_many", "about", "everybody", "verify"])
def test_a_reader_is_told_of_no_damage_when_what_described_a_row_is_gone(ask, max_waiting, store, base, monkeypatch):
    """Between a reader's look at bob's entry and the rest, bob is replaced and the store compacted: his configuration,
    his metrics' form and what lay under him are gone."""
    monkeypatch.setattr(archive, "MAX_WAITING", max_waiting)
    ann, newer = make_adapter(), replace(make_adapter("bob", seed=2), metrics={"epochs": 1})
    store.add_many([ann, replace(make_adapter("bob", LoRA(2)), metrics={"y": 1}, under=make_adapter("below"))], base)
    reader, look, moved = Store(store.folder), Index._entry, []

    def look_then_move(index, values):
        found = look(index, values)
        if index is reader._archive.index and found.key == b"bob" and not moved:
            moved.append(store.add(newer, base))
            store.compact()
        return found

    monkeypatch.setattr(Index, "_entry", look_then_move)
    if ask == "get":
        assert same(reader.get("bob", base), newer)
    elif ask == "get_many":
        assert all(map(same, reader.get_many(["bob", "ann"], base), [newer, ann]))
    elif ask == "verify":
        assert reader.verify() == []
    else:
        about = reader.about("bob") if ask == "about" else dict(reader.everybody())["bob"]
        assert about == (newer.method, newer.metrics, 2)
    assert moved


def test_everybody_leaves_out_who_is_deleted_meanwhile(store, base):
    store.add_many([make_adapter("ann"), make_adapter("bob", LoRA(2))], base)
    everybody = Store(store.folder).everybody()
    assert next(everybody)[0] == "ann"
    store.delete("bob")
    store.compact()
    assert list(everybody) == []


def test_a_second_writer_waits_or_is_told(store, base):
    hurried = Store(store.folder, timeout=0.05)
    with only_writer(store.folder, 0):
        assert store.users() == []  # readers do not mind
        with pytest.raises(InputError, match=rf"is being written by process {os.getpid()} on .* and was for 0.05 s"):
            hurried.add(make_adapter(), base)
        with pytest.raises(InputError, match="is being written by"):
            hurried.compact()
    hurried.add(make_adapter(), base)
    assert store.users() == ["ann"]
    code = ("import fcntl, sys, time; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX)\n"
            "print('mine', flush=True); time.sleep(0.5)")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code, store.folder / "writer.lock"], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        began = time.monotonic()
        store.add(make_adapter("bob"), base)
        assert time.monotonic() - began > 0.2 and store.users() == ["ann", "bob"]


def in_a_child(limit, largest, work):
    """work() in a process of its own under a limit; it must end well."""
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(limit, (largest, largest))
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("may_map", [1024, None], ids=["more than there is room for", "as many as there is room for"])
def test_more_shards_than_a_process_may_open_files(may_map, store, base, monkeypatch):
    """Python's mmap keeps a descriptor; whole adapters are never called damaged for want of one."""
    no_waiting(monkeypatch)
    monkeypatch.setattr(archive, "MAX_BYTES", 1)  # a shard for each
    kept = {f"user {i:02d}": make_adapter(f"user {i:02d}", LoRA(1, sites=("q",)), seed=i) for i in range(60)}
    store.add_many(kept.values(), base)
    store.close()

    def read():
        if may_map:
            monkeypatch.setattr(archive, "may_map", lambda: may_map)
        reader = Store(store.folder)
        assert holds(reader, base, kept) and holds(reader, base, kept)
        if may_map is None:
            assert 1 < len(reader._archive._mapped) <= 16
        reader._archive._mapped.clear()
        taken = []
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(InputError, match=r"cannot be opened \(Too many open files\); close other") as said:
            reader.get("user 00", base)
        assert "damaged" not in str(said.value)
        monkeypatch.setattr(Index, "located", lambda index: [index.entry(b"user 00")])  # SQLite needs a file for it
        with pytest.raises(InputError, match="Too many open files"):
            reader.verify()
        os.close(taken.pop())  # one to open a shard, one that its map keeps
        os.close(taken.pop())
        assert all(same(reader.get(user, base), adapter) for user, adapter in kept.items())

    in_a_child(resource.RLIMIT_NOFILE, 64, read)


def test_no_limit_on_open_files_is_no_limit_on_shards(monkeypatch):
    for limit, expected in ((resource.RLIM_INFINITY, 1024), (1024, 256), (1 << 20, 1024), (2, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))  # noqa: B023
        assert archive.may_map() == expected


# ---- Damage --------------------------------------------------------------------------------------------------------


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_and_its_user_named(store, base, monkeypatch):
    no_waiting(monkeypatch)
    users = [f"user {i}" for i in range(5)]
    store.add_many([make_adapter(user, seed=i) for i, user in enumerate(users)], base)
    (file,) = shard_files(store)
    row_bytes = 4 * make_adapter().method.count(base)
    for row, offset in ((0, 0), (3, 17), (4, row_bytes - 1)):
        flip(file, 128 + row * row_bytes + offset)
    damaged = store.verify()
    assert [(d.user, d.shard, d.row) for d in damaged] == [("user 0", 1, 0), ("user 3", 1, 3), ("user 4", 1, 4)]
    assert "the adapter of user 'user 3' is damaged (shard 1, row 3): its checksum is not" in damaged[1].what
    for user in ("user 0", "user 3", "user 4"):
        with pytest.raises(InputError, match=rf"user '{user}' is damaged \(shard 1, row {user[-1]}\)"):
            store.get(user, base)
    assert same(store.get("user 1", base), make_adapter("user 1", seed=1))
    with pytest.raises(InputError, match="train or import it again, or delete it"):
        store.delete("user 1") or store.compact()
    for user in ("user 0", "user 3", "user 4"):
        store.delete(user)
    store.compact()
    assert store.users() == ["user 2"] and store.verify() == []


@pytest.mark.parametrize("damage", [
    "UPDATE waiting SET row = zeroblob(length(row))", "DELETE FROM waiting", "UPDATE adapters SET shard = 7",
    "UPDATE adapters SET numbers = CAST(x'00' || substr(numbers, 2) AS BLOB)",
    "UPDATE adapters SET id = CAST(x'7a' || id AS BLOB)",
    "UPDATE adapters SET configuration = 3 - configuration", "UPDATE forms SET codes = replace(codes, 'd', 'q')",
    "UPDATE configurations SET method = replace(method, '7.0', '9.0')", "DELETE FROM configurations",
    "UPDATE forms SET skeleton = replace(skeleton, 'steps', 'pasta')", "DELETE FROM forms",
])  # fmt: skip
def test_a_row_in_the_index_and_whatever_describes_it_has_a_checksum_too(damage, store, base):
    store.add(make_adapter(), base)
    store.add(make_adapter("bob", LoRA(2, 7.0)), base)
    store.close()
    index = sqlite3.connect(store.folder / "index.sqlite")
    with index:
        index.execute(damage)
    index.close()
    store = Store(store.folder)
    damaged = store.verify()
    assert len(damaged) == 2
    for damage in damaged:
        with pytest.raises(InputError, match="damaged"):
            store.get(damage.user, base)


@pytest.mark.parametrize("damage", ["UPDATE configurations SET width = 0", "UPDATE configurations SET width = -1",
                                    "UPDATE shards SET n = 0", "UPDATE shards SET n = -1"])  # fmt: skip
def test_no_rows_or_rows_of_nothing_are_damage(damage, store, base, monkeypatch):
    no_waiting(monkeypatch)
    store.add(make_adapter(), base)
    store._archive.index.rows(damage)
    for call in ("get", "compact", "verify"):
        store = Store(store.folder)
        if call == "verify":
            assert [damage.user for damage in store.verify()] == ["ann"]
            continue
        with pytest.raises(InputError, match=r"damaged: (rows of|a shard of) (0|-1)"):
            store.get("ann", base) if call == "get" else store.compact()


@pytest.mark.parametrize("spoil", ["cut", "longer", "empty", "header", "gone", "link", "folder", "pipe"])
def test_a_spoilt_shard_is_an_error(spoil, store, base, monkeypatch):
    no_waiting(monkeypatch)
    store.add(make_adapter(), base)
    (file,) = shard_files(store)
    content = file.read_bytes()
    file.unlink()
    if spoil == "link":
        (store.folder / "elsewhere").write_bytes(content)
        file.symlink_to(store.folder / "elsewhere")
    elif spoil == "folder":
        file.mkdir()
    elif spoil == "pipe":
        os.mkfifo(file)
    elif spoil != "gone":
        file.write_bytes({"cut": content[:-1], "longer": content + b"x", "empty": b"",
                          "header": content.replace(b'"F32"', b'"I32"')}[spoil])  # fmt: skip
    for call in (lambda: store.get("ann", base), lambda: Store(store.folder).get("ann", base)):
        with pytest.raises(InputError, match="damaged"):
            call()
    assert [damage.user for damage in store.verify()] == ["ann"]
    store.add(make_adapter(seed=5), base)
    assert same(store.get("ann", base), make_adapter(seed=5)) and store.verify() == []


@pytest.mark.parametrize("content", [b"", b"{", b"SQLite format 3\0" + bytes(100), None, "view", "trigger", "table"])
def test_an_index_of_somebody_elses_making_is_an_error(content, store, base):
    store.add(make_adapter(), base)
    store.close()
    path = store.folder / "index.sqlite"
    if content is None:
        path.rename(store.folder / "elsewhere")
        path.symlink_to(store.folder / "elsewhere")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as index:
            index.execute({"view": "CREATE VIEW more AS SELECT 1", "table": "CREATE TABLE more (x)",
                           "trigger": "CREATE TRIGGER t AFTER INSERT ON waiting BEGIN DELETE FROM forms; END"}[content])
        index.close()
    with pytest.raises(InputError, match=r"index\.sqlite"):
        Store(store.folder)


@pytest.mark.parametrize("name, value", [
    ("base", "3"), ("base", '{"name": 1}'), ("base", '{"name": 1, "folder": 2, "fingerprint": 3}'), ("base", ""),
    ("task", '{"name": 1}'), ("task", "["), ("rows", "fp4"), ("rows", ""),
])  # fmt: skip
def test_a_store_that_does_not_say_whose_it_is_is_an_error(name, value, store):
    store.close()
    index = sqlite3.connect(store.folder / "index.sqlite")
    with index:
        index.execute("DELETE FROM about WHERE name = ?", (name,))
        if value:
            index.execute("INSERT INTO about VALUES (?, ?)", (name, value))
    index.close()
    with pytest.raises(InputError, match=r"index\.sqlite"):
        Store(store.folder)


@pytest.mark.parametrize("tree, kind", [("adapters", 5), ("sqlite_autoindex_adapters_1", 2), ("waiting_of", 2)])
def test_pages_that_go_round_in_circles_come_to_an_end(tree, kind, store, base, monkeypatch):
    """An enemy's tree in which every branch is the first leaf again: its entries never end."""
    one = make_adapter(method=LoRA(1, sites=("k",)))
    store.add_many([replace(one, user=f"user {i:04d}") for i in range(600)], base)
    store.close()
    path = store.folder / "index.sqlite"
    with sqlite3.connect(path) as index:
        page_size = index.execute("PRAGMA page_size").fetchone()[0]
        (root,) = index.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (tree,)).fetchone()
    index.close()
    content = bytearray(path.read_bytes())
    page = (root - 1) * page_size
    assert content[page] == kind, "an inner page"
    cells = int.from_bytes(content[page + 3 : page + 5], "big")
    places = [page + int.from_bytes(content[page + 12 + 2 * i : page + 14 + 2 * i], "big") for i in range(cells)]
    first = content[places[0] : places[0] + 4]
    for place in (*places, page + 8):
        content[place : place + 4] = first
    path.write_bytes(content)
    again = Store(store.folder)
    monkeypatch.setattr(archive, "MAX_WAITING", 400 * 4 * one.method.count(base))
    listing = () if tree == "waiting_of" else (again.users, lambda: list(again.everybody()))
    adding = (lambda: again.add(one, base),) if tree == "waiting_of" else ()
    for call in (*listing, *adding, again.verify, again.compact):
        with pytest.raises(InputError, match=r"index\.sqlite is damaged"):
            call()


def test_no_more_rows_are_taken_from_the_index_than_may_wait_there(store, base, monkeypatch):
    """A store from elsewhere may have any number: each add takes a shard's worth, the others wait on."""
    kept = {f"user {i}": make_adapter(f"user {i}", seed=i) for i in range(20)}
    store.add_many(kept.values(), base)
    monkeypatch.setattr(archive, "MAX_WAITING", 4 * 4 * make_adapter().method.count(base))
    asked = []
    monkeypatch.setattr(store._archive.index, "waiting_rows",
                        lambda *args, **named: asked.append(Index.waiting_rows(store._archive.index, *args, **named))
                        or asked[-1])  # fmt: skip
    for i in range(20, 24):
        kept[f"user {i}"] = make_adapter(f"user {i}", seed=i)
        store.add(kept[f"user {i}"], base)
    assert [len(rows) for rows in asked] == [5, 5, 5, 5] and holds(store, base, kept)
    store.add(make_adapter("user 24"), base)
    assert len(asked) == 4 and len(shard_files(store)) == 4, "it waits, as usual"


@pytest.mark.parametrize("value", [bytes(100), "x" * 100, None, 7, b""])
def test_rows_that_wait_have_their_length(value, store, base, monkeypatch):
    store.add_many([make_adapter(), make_adapter("bob")], base)
    store._archive.index.rows("UPDATE waiting SET row = ? WHERE id = 'bob' OR id = CAST('bob' AS BLOB)", value)
    no_waiting(monkeypatch)
    monkeypatch.setattr(archive, "MAX_WAITING", 2 * 4 * make_adapter().method.count(base))
    with pytest.raises(InputError, match="damaged: rows that wait have not"):
        store.add(make_adapter("cy"), base)


def lengthen(store, width):
    """The only configuration's rows have this width, and its shard is a file of that size, which takes no disk."""
    header = shards._header(1, width, "float32")
    store._archive.index.rows("UPDATE configurations SET width = ?", width)
    store._archive.index.rows("UPDATE shards SET n = 1")
    with open(shard_files(store)[0], "wb") as file:
        file.write(header)
        file.truncate(len(header) + 4 * width)
    return Store(store.folder)


def test_rows_are_as_long_as_the_base_makes_them_or_refused(store, base, monkeypatch):
    """An enemy's shard of rows of 16 GB that takes no disk: nothing is allocated for it."""
    no_waiting(monkeypatch)
    store.add(make_adapter(), base)
    enemys = lengthen(store, 4_000_000_000)
    with pytest.raises(InputError, match="damaged: rows of 4000000000 numbers"):
        enemys.get("ann", base)
    assert ["damaged: rows of 4000000000 numbers" in damage.what for damage in enemys.verify()] == [True]
    enemys, width = lengthen(store, 1 << 26), 1 << 26
    monkeypatch.setattr(archive.Archive, "_checksum",
                        lambda self, configuration, of, row: pytest.fail("it is read before it is judged"))  # fmt: skip
    with pytest.raises(InputError, match=f"its row has {width} numbers, this base needs [0-9]+, or others"):
        enemys.get("ann", base)


def test_verify_takes_no_memory_for_a_row(store, base, monkeypatch):
    no_waiting(monkeypatch)
    store.add(make_adapter(), base)
    lengthen(store, 1 << 24).close()
    store.close()
    row, used = 64 << 20, int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def verify():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ((user, *_, what),) = Store(store.folder).verify()
        assert user == "ann" and "its checksum is not that of the index" in what
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < row // 1024 // 2

    in_a_child(resource.RLIMIT_AS, used + row + row // 2, verify)


def test_an_adapter_longer_than_a_store_keeps_is_refused(store, base, monkeypatch):
    monkeypatch.setattr(archive, "MAX_WIDTH", 9)
    with pytest.raises(InputError, match=r"an adapter has [\d,]+ numbers; a store keeps at most 9 of each"):
        store.add(make_adapter(), base)


@pytest.mark.parametrize("sql", [
    "UPDATE about SET value = '[' || ? || ']' WHERE name = 'task'", "UPDATE about SET value = ? WHERE name = 'rows'",
    "UPDATE forms SET skeleton = '[' || ? || ']'", "UPDATE forms SET codes = ?",
    "UPDATE configurations SET method = '[' || ? || ']'", "UPDATE configurations SET layout = ?",
])  # fmt: skip
def test_texts_too_long_to_be_parsed_are_not(sql, store, base, monkeypatch):
    """JSON takes 25 times its size as it is parsed."""
    store.add(make_adapter(), base)
    store._archive.index.rows(sql, "{}," * (5 << 20) + "{}")
    monkeypatch.setattr(store_module.json, "loads", lambda text: pytest.fail("it is parsed") if len(text) > 1 << 20
                        else loads(text))  # fmt: skip
    with pytest.raises(InputError, match="has values of the wrong type, or too long"):
        Store(store.folder).get("ann", base)


def test_texts_too_long_to_be_read_are_not_kept(store, base, tmp_path):
    with pytest.raises(InputError, match=r"the metrics of .*'ann'.* have 1048586 bytes; needed at most 1048576"):
        store.add(replace(make_adapter(), metrics={"x" * (1 << 20): None}), base)
    with pytest.raises(InputError, match="'layout' has 1,048,577 characters; a store keeps at most 1,048,576"):
        store._archive.configuration_number("", "x" * ((1 << 20) + 1), b"", 1)
    long = replace(TASK, instruction="x" * (1 << 20))
    with pytest.raises(InputError, match=r"'task' has .* characters; a store keeps at most"):
        Store.make(tmp_path / "other", base, long)
    taskless = Store.make(tmp_path / "third", base)
    with pytest.raises(InputError, match=r"'task' has .* characters; a store keeps at most"):
        Store.make(tmp_path / "third", base, long)
    assert store.users() == taskless.users() == []


def test_a_value_longer_than_any_is_damage(store):
    index = sqlite3.connect(store.folder / "index.sqlite")
    with index:
        index.execute("UPDATE about SET value = zeroblob(20000000)")
    index.close()
    with pytest.raises(InputError, match=r"index\.sqlite is damaged: string or blob too big"):
        Store(store.folder)


def test_a_folders_name_may_be_any(tmp_path, base):
    for name in (b"\xff", b"a?b#c%41", "é".encode()):
        folder = tmp_path / os.fsdecode(name)
        Store.make(folder, base).add(make_adapter(), base)
        assert same(Store(folder).get("ann", base), make_adapter()) and (folder / "index.sqlite").exists()


def test_a_store_of_the_old_layout_is_an_error_that_names_the_fix(tmp_path, base):
    (tmp_path / "store.json").write_text("{}")
    for call in (lambda: Store(tmp_path), lambda: Store.make(tmp_path, base)):
        with pytest.raises(InputError, match="a store of an earlier minipeft, one file for each user; train or import"):
            call()


def test_a_folder_that_may_not_be_written_can_be_read(store, base, monkeypatch):
    """Beside a writer, when nobody is at it, and when somebody has begun to write since."""
    may_write, before = True, make_adapter()
    monkeypatch.setattr(os, "access", lambda path, mode: may_write)
    store.add(before, base)
    may_write = False
    reader = Store(store.folder)
    assert same(reader.get("ann", base), before)
    reader.close()
    (store.folder / "index.sqlite-shm").rename(store.folder.parent / "shm")
    with pytest.raises(InputError, match=r"may not be written, but index\.sqlite-wal holds changes"):
        Store(store.folder)
    (store.folder.parent / "shm").rename(store.folder / "index.sqlite-shm")
    store.close()
    files, reader = sorted(store.folder.iterdir()), Store(store.folder)
    assert not any("wal" in file.name for file in files)
    assert same(reader.get("ann", base), before) and reader.verify() == []
    assert sorted(store.folder.iterdir()) == files
    for seed in (1, 2):
        may_write = True
        writer, newer = Store(store.folder), make_adapter(seed=seed)
        may_write = False
        no_waiting(monkeypatch)
        writer.add_many([newer, *(make_adapter(f"user {i}") for i in range(99))], base)
        assert same(reader.get("ann", base), newer), "which is in the log alone"
        writer.compact()
        if seed == 2:
            writer.close()
        assert same(reader.get("ann", base), newer) and reader.verify() == [] and len(reader.users()) == 100


# ---- Crashes -------------------------------------------------------------------------------------------------------


def test_the_disk_has_a_row_before_the_index_does(store, base, monkeypatch):
    """File, its name, the folder, and only then the transaction that the user counts by."""
    no_waiting(monkeypatch)
    said = []
    monkeypatch.setattr(os, "fsync", spy(os.fsync, "fsync", said))
    monkeypatch.setattr(Path, "rename", spy(Path.rename, "rename", said))
    monkeypatch.setattr(Index, "write", spy(Index.write, "index", said))
    store.add(make_adapter(), base)
    assert [name for name in said if name != "index"] == ["fsync", "rename", "fsync"] and said[-1] == "index"
    ((level,),) = store._archive.index.rows("PRAGMA synchronous")
    assert level == 2, "a commit waits for the disk"


def spy(function, name, said):
    def told(*args, **named):
        said.append(name)
        return function(*args, **named)

    return told


@pytest.mark.parametrize("where", ["write", "fsync", "rename", "index", "commit"])
def test_a_write_that_fails_leaves_everything_as_it_was(where, store, base, monkeypatch):
    no_waiting(monkeypatch)
    before = [make_adapter("ann", seed=1), make_adapter("bob", seed=2)]
    store.add_many(before, base)

    def fail(*args, **named):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        target, name = {"write": (archive, "write_shard"), "fsync": (os, "fsync"), "rename": (Path, "rename"),
                        "index": (Index, "write"), "commit": (archive, "sync")}[where]  # fmt: skip
        patch.setattr(target, name, fail)
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); what was stored before"):
            store.add_many([make_adapter("ann", LoRA(2), seed=3), make_adapter("cy", LoRA(2))], base)
    for one in (store, Store(store.folder)):
        assert one.users() == ["ann", "bob"] and all(map(same, one.get_many(["ann", "bob"], base), before))
    store.add(make_adapter("dee", LoRA(4)), base)  # another configuration takes the number that was taken back
    assert same(store.get("dee", base), make_adapter("dee", LoRA(4))) and store.verify() == []
    assert len(shard_files(store)) == 2, "what the failed write left is gone"


def test_what_a_dead_writer_left_is_removed_and_nothing_else(store, base, monkeypatch):
    no_waiting(monkeypatch)
    store.add(make_adapter(), base)
    folder = store.folder / "shards"
    (one,) = shard_files(store)
    (folder / "00000002.safetensors").write_bytes(one.read_bytes())
    (folder / "00000009.tmp").write_bytes(b"half")
    (folder / "mine.txt").write_text("not yours")
    assert Store(store.folder).users() == ["ann"] and len(shard_files(store)) == 4, "a reader removes nothing"
    Store(store.folder).add(make_adapter("bob"), base)
    assert [path.name for path in shard_files(store)] == ["00000001.safetensors", "00000002.safetensors", "mine.txt"]
    assert holds(store, base, {user: make_adapter(user) for user in ("ann", "bob")})


def test_compact_removes_what_another_left_and_waits_for_the_disk(store, base, monkeypatch):
    """Another writer was killed in `compact` after this one had written: deleted numbers that no index names."""
    no_waiting(monkeypatch)
    store.add_many([make_adapter(), make_adapter("bob")], base)
    (one,) = shard_files(store)
    (store.folder / "shards" / "00000009.safetensors").write_bytes(one.read_bytes())
    store.delete("bob")
    said = []
    monkeypatch.setattr(Path, "unlink", spy(Path.unlink, "unlink", said))
    monkeypatch.setattr(archive, "sync", spy(archive.sync, "sync", said))
    store.compact()
    assert [path.name for path in shard_files(store)] == ["00000002.safetensors"]
    assert said == ["unlink", "sync", "unlink", "sync"]


def test_a_shards_folder_that_is_a_link_is_not_cleaned_up(store, base, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "00000001.safetensors").write_text("somebody's")
    (store.folder / "shards").rmdir()
    (store.folder / "shards").symlink_to(elsewhere)
    for call in (lambda: Store.make(store.folder, base), lambda: Store(store.folder).add(make_adapter(), base)):
        with pytest.raises(InputError, match="shards is not a folder of its own"):
            call()
    assert (elsewhere / "00000001.safetensors").exists()


def test_making_a_store_that_was_interrupted_goes_on(tmp_path, base):
    (tmp_path / "shards").mkdir()
    sqlite3.connect(tmp_path / "index.sqlite").close()
    (tmp_path / "index.sqlite").touch()
    store = Store.make(tmp_path, base, TASK)
    store.add(make_adapter(), base)
    assert Store(tmp_path).users() == ["ann"]


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    write_file(tmp_path / "a.json", b"before")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "a.json", b"after")
    assert (tmp_path / "a.json").read_bytes() == b"before"
