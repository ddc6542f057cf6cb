"""What do commands leave in a store, when all goes well and on Ctrl-C?"""

import json
import os
import shutil
import signal
import sqlite3

import pytest
import torch
from commands import ask, printed, rows_of, run

from minipeft.running import open_base
from minipeft.store import Store
from minipeft.tasks.task import load_task, save_task


def test_ctrl_c_keeps_who_had_finished(task, bases, tmp_path, capsys, monkeypatch):
    add_many = Store.add_many

    def add_then_interrupt(store, adapters, base):
        few = len(store.users()) < 2
        add_many(store, adapters, base)
        if few and len(store.users()) >= 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Store, "add_many", add_then_interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores Ctrl-C
    try:
        assert run("train", "--model", bases["decoder"], "--task", task, "--method", "lora", "--store",
                   tmp_path / "store") == 130  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    assert "interrupted." in error and "Traceback" not in error and f"adapters are in {tmp_path / 'store'}" in error
    store = Store(tmp_path / "store")
    assert 2 <= len(store.users()) < 6  # who was done in the same pass is kept as well
    for user in store.users():
        assert run("predict", "--store", store.folder, "--model", bases["decoder"], "--user", user, "--text", "a") == 0


def test_a_store_grows_and_users_in_it_are_trained_again_only_when_asked(task, bases, tmp_path, capsys):
    argv = ["train", "--model", bases["decoder"], "--task", task, "--store", tmp_path / "store", "--epochs", 1]
    assert run(*argv, "--method", "lora", "--users", 2) == 0
    two = Store(tmp_path / "store").users()
    assert run(*argv, "--method", "lora") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has an adapter of 2 of these users already, e.g." in error and "--again" in error
    assert run(*argv, "--method", "ia3", "--again") == 0
    store = Store(tmp_path / "store")
    assert len(store.users()) == 6 and set(two) < set(store.users())
    assert {store.about(user)[0].name for user in store.users()} == {"ia3"}


def test_one_store_may_hold_users_of_different_methods(task, bases, tmp_path, capsys, monkeypatch):
    """With virtual tokens and without, each cut as their own method needs."""
    base, everybody = bases["decoder"], load_task(task)
    for user, method in (("ann", ["prompt", "--tokens", 85]), ("bob", ["lora"])):
        part = tmp_path / user
        save_task(everybody.subset([user]), part)
        assert run("train", "--model", base, "--task", part, "--method", *method, "--epochs", 1, "--store",
                   tmp_path / "store") == 0  # fmt: skip
    capsys.readouterr()
    text = " ".join(example.text for example in everybody.test["ann"])[:60]
    assert ask(monkeypatch, tmp_path / "store", base, [{"user": user, "text": text} for user in ("ann", "bob")]) == 0
    assert [json.loads(line)["was_cut"] for line in capsys.readouterr().out.splitlines()] == [True, False]


def test_a_store_is_verified_compacted_and_a_user_deleted(bases, stores, tmp_path, capsys):
    folder, base = shutil.copytree(stores["decoder"], tmp_path / "store"), open_base(bases["decoder"], 2)
    assert run("store", "verify", "--store", folder, "--json") == 0
    assert printed(capsys) == {"num_users": 6, "damaged": []}
    assert run("store", "delete", "--store", folder, "--user", "ann") == 0
    assert "stay on disk until `store compact`" in capsys.readouterr().out
    assert run("store", "compact", "--store", folder, "--json") == 0
    assert printed(capsys) == {"shards_before": 0, "shards_after": 0, "rows_removed": 0, "erased": True}
    assert "ann" not in Store(folder) and torch.isfinite(Store(folder).get("bob", base).row).all()
    with sqlite3.connect(folder / "index.sqlite") as index:
        index.execute("UPDATE waiting SET row = zeroblob(length(row)) WHERE id = ?", (b"bob",))
    index.close()
    assert run("store", "verify", "--store", folder, "--json") == 1
    *lines, last = capsys.readouterr().out.splitlines()
    (damaged,) = json.loads(last)["damaged"]
    assert damaged["user"] == "bob" and lines == [damaged["what"], "5 users, 1 damaged"]
    assert "the adapter of user 'bob' is damaged (waiting in the index): its checksum is not" in damaged["what"]


@pytest.mark.parametrize("rows", ["bfloat16", "int8"])
def test_rows_may_be_kept_smaller(rows, task, bases, stores, tmp_path, capsys):
    argv = ("train", "--model", bases["decoder"], "--task", task, "--method", "lora", "--rank", 2, "--epochs", 2,
            "--learning-rate", 0.01, "--seed", 3, "--store", tmp_path / "store")  # fmt: skip
    assert run(*argv, "--rows", rows) == 0
    base, exact = open_base(bases["decoder"], 2), Store(stores["decoder"])
    for user, row in rows_of(tmp_path / "store", base).items():
        expected = exact.get(user, base).row
        assert 0 < (row - expected).abs().max() < 0.01 * expected.abs().max()
    assert run("eval", "--store", tmp_path / "store", "--model", bases["decoder"], "--task", task) == 0
