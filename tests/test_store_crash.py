"""Does a store survive kill -9, a full disk and an enemy? Small runs of benchmarks/kill_test.py and fuzz_store.py."""

import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import fuzz_store
import kill_test

from minipeft import archive
from minipeft.errors import InputError
from minipeft.index import Index
from minipeft.models.loading import Origin
from minipeft.store import Store


@pytest.fixture
def base(tmp_path):
    base = fuzz_store.base_of()
    base.origin = Origin(tmp_path, "base", base)
    return base


def test_nothing_reported_is_lost_when_writers_are_killed(tmp_path):
    found = kill_test.Found()
    kill_test.killed(tmp_path / "store", kill_test.base_of(tmp_path), 8, 5, found)
    assert found.operations > 0 and found == kill_test.Found(found.operations, lost=0, damaged=0)


@pytest.mark.parametrize("may_write", [True, False], ids=["", "who may not write"])
def test_readers_go_on_while_a_writer_adds_replaces_deletes_and_compacts(may_write, tmp_path, monkeypatch):
    base = kill_test.base_of(tmp_path)
    Store.make(tmp_path / "store", base).close()
    with kill_test.writer(tmp_path / "store", base, 11, 0, {}) as (process, _):
        monkeypatch.setattr(os, "access", lambda path, mode: may_write)
        store, read, until = Store(tmp_path / "store"), 0, time.monotonic() + 3
        while time.monotonic() < until:
            there = store.users()
            for user in random.sample(there, min(20, len(there))):
                try:
                    adapter = store.get(user, base)
                except InputError as error:
                    assert "no adapter of user" in str(error), "only deleted meanwhile"
                    continue
                read += 1
                assert torch.equal(adapter.row, kill_test.adapter_of(user, adapter.metrics["operation"]).row)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert read > 50 and store.verify() == []


@pytest.mark.parametrize("size", [1 << 20, 5 << 20])
def test_nothing_reported_is_lost_when_a_file_can_grow_no_more(size, tmp_path, capfd):
    found = kill_test.Found()
    kill_test.until_full(tmp_path / "store", kill_test.base_of(tmp_path), 3, found, limit=size)
    assert found.operations > 0 and found == kill_test.Found(found.operations, lost=0, damaged=0)
    assert "the writer was told: " in capfd.readouterr().err


def test_the_kill_test_would_notice(tmp_path, monkeypatch):
    """A writer that enters users before their rows are there."""
    write = archive.write_shard
    monkeypatch.setattr(archive, "MAX_WAITING", 0)

    def write_later(path, n, width, kind, rows):
        write(path, n, width, kind, [bytes(len(memoryview(row).cast("B"))) for row in rows])

    monkeypatch.setattr(archive, "write_shard", write_later)
    found = kill_test.Found()
    with suppress(RuntimeError):  # of a writer that was told of the damage
        kill_test.killed(tmp_path / "store", kill_test.base_of(tmp_path), 3, 5, found)
    assert found.damaged > 0


@pytest.mark.parametrize("error", [ZeroDivisionError, InputError])
def test_a_writer_that_fails_is_no_proof(error, tmp_path, monkeypatch, capfd):
    def fail(*args):
        raise error("for another reason")

    monkeypatch.setattr(Store, "add_many", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT))  # till it ended
    base, found = kill_test.base_of(tmp_path), kill_test.Found()
    with pytest.raises(RuntimeError, match="the writer ended with 1, needed -9"):
        kill_test.killed(tmp_path / "killed", base, 1, 5, found)
    with pytest.raises(RuntimeError, match="the writer ended with 1, needed 0"):
        kill_test.until_full(tmp_path / "full", base, 5, found)
    assert "for another reason" in capfd.readouterr().err


def test_a_spoilt_store_says_so_and_never_hands_out_a_wrong_row(tmp_path):
    assert fuzz_store.fuzz(range(120), 7, tmp_path) == []


@pytest.mark.parametrize("break_it", ["checksum", "error"])
def test_the_fuzzer_would_notice(break_it, tmp_path, monkeypatch, capfd):
    if break_it == "checksum":
        monkeypatch.setattr(archive.zlib, "crc32", lambda data, start=0: 1 << 31)
    else:
        monkeypatch.setattr(Index, "_typed", lambda index, table, values, types: values)
    assert fuzz_store.fuzz(range(60), 7, tmp_path) != []


def test_a_method_that_would_take_all_memory_is_an_error(tmp_path, base, monkeypatch):
    """What an index says of a method is judged before anything of that size is made."""
    fuzz_store.make(tmp_path / "whole", base)
    store = Store(tmp_path / "whole")
    monkeypatch.setattr(archive.Archive, "_checksum", fuzz_store.forged_checksum)
    for described in ('{"name": "prompt", "tokens": 1152921504606846976}', '{"name": "vera", "rank": 1099511627776}',
                      '{"name": "ptuning", "layers": 1152921504606846976}'):  # fmt: skip
        store._archive.index.write("UPDATE configurations SET method = ?, layout = number", [(described,)])
        with pytest.raises(InputError, match=r"positions|rank must be|layers"):
            Store(tmp_path / "whole").get("user 1", base)
