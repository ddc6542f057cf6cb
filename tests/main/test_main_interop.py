"""Do export and import hand on whose adapter they were asked for?"""

import json
import shutil
import sqlite3
from dataclasses import replace

import pytest
import torch
from commands import printed, run

from minipeft.methods.lora import LoRA
from minipeft.methods.method import method_from
from minipeft.running import for_base, open_base
from minipeft.store import Store
from minipeft.tasks.task import load_task


@pytest.mark.parametrize("kind", ["decoder", "t5"])
def test_export_and_import_pass_on_the_adapter(kind, task, bases, stores, tmp_path, capsys, fake):
    store, base = stores[kind], open_base(bases[kind], 2)
    there = ["--to", tmp_path / "ann", "--format", "peft", "--json"]
    assert run("export", "--store", store, "--user", "ann", *there) == 0  # the model that the store names
    adapter, base_kind = fake.kept[str(tmp_path / "ann")]
    assert torch.equal(adapter.row, Store(store).get("ann", base).row) and base_kind == type(base).__name__
    assert method_from(printed(capsys)["method"]) == adapter.method
    assert run("export", "--store", store, "--user", "ann", *there, "--model", bases[kind]) == 0
    assert run("export", "--store", store, "--user", "ann", *there, "--model", bases["gpt2"]) == 2
    assert "belongs to base" in capsys.readouterr().err

    take = ["import", "--from", tmp_path / "ann", "--user", "zoe", "--store", tmp_path / "new", "--model", bases[kind]]
    assert run(*take) == 0
    assert torch.equal(Store(tmp_path / "new").get("zoe", base).row, adapter.row)
    ask_zoe = ["predict", "--store", tmp_path / "new", "--model", bases[kind], "--user", "zoe", "--text", "a", "--json"]
    assert run(*ask_zoe) == 2
    assert "does not say for which task" in capsys.readouterr().err
    assert run(*take) == 2
    assert "has an adapter of user 'zoe' already" in capsys.readouterr().err
    assert run(*take, "--again", "--task", task) == 0 and run(*ask_zoe) == 0
    imported = printed(capsys)
    assert run("predict", "--store", store, "--model", bases[kind], "--user", "ann", "--text", "a", "--json") == 0
    assert imported == printed(capsys) | {"user": "zoe"}


@pytest.mark.parametrize("folder", ["somebody/model", "a\0b", "x" * 5000, "/nowhere"])
def test_export_downloads_no_base_that_a_store_names(folder, stores, tmp_path, monkeypatch, capsys, fake):
    """Who made the store says where its base is: a hub's name would be fetched."""
    shutil.copytree(stores["decoder"], tmp_path / "store")
    index = sqlite3.connect(tmp_path / "store" / "index.sqlite")
    with index:
        ((base,),) = index.execute("SELECT value FROM about WHERE name = 'base'")
        about = json.dumps({**json.loads(base), "folder": folder})
        index.execute("UPDATE about SET value = ? WHERE name = 'base'", (about,))
    index.close()
    monkeypatch.setattr("minipeft.__main__.load_model", lambda *_: pytest.fail("it would be fetched"))
    assert run("export", "--store", tmp_path / "store", "--to", tmp_path / "x", "--format", "peft") == 2
    assert "any more; name its folder with --model" in capsys.readouterr().err


def test_an_encoders_adapter_is_exported_without_its_head_and_says_so(bases, stores, tmp_path, capsys, fake):
    base = open_base(bases["bert"], 2)
    assert run("export", "--store", stores["bert"], "--user", "ann", "--to", tmp_path / "x", "--format", "peft") == 0
    assert "without the head" in capsys.readouterr().out
    whole, (exported, _) = Store(stores["bert"]).get("ann", base), fake.kept[str(tmp_path / "x")]
    assert exported.method == whole.method.members[0] == for_base(LoRA(rank=2), base).members[0]
    tensors = whole.method.tensors(whole.row, base)
    own = exported.method.tensors(exported.row, base)
    assert tensors.keys() - own.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in own.items())
    assert run("import", "--from", tmp_path / "x", "--user", "zoe", "--store", tmp_path / "new", "--model",
               bases["bert"]) == 0  # fmt: skip
    assert "it has no head, so every label is as likely" in capsys.readouterr().out


def test_everybodys_adapters_are_exported_whatever_their_ids(task, bases, stores, tmp_path, capsys):
    """Into folders of the one that was named, which users.jsonl lists; and back in."""
    base = open_base(bases["decoder"], 2)
    ann = Store(stores["decoder"]).get("ann", base)
    users = ["ann", "../../x", "a/b\0c", "", "..", "👩", "x" * 10_000, "'; DROP TABLE adapters; --", "a\nb", "%2E",
             "\x1b[2J"]  # fmt: skip
    store = Store.make(tmp_path / "a" / "store", base, load_task(task).header)
    store.add_many([replace(ann, user=user, row=ann.row + i) for i, user in enumerate(users)], base)
    folder = tmp_path / "a" / "exported"
    assert run("export", "--store", store.folder, "--to", folder, "--format", "peft", "--json") == 0
    assert printed(capsys)["num_users"] == len(users)
    listed = [json.loads(line) for line in (folder / "users.jsonl").read_text().splitlines()]
    assert {line["user"] for line in listed} == {*users} and len({line["folder"] for line in listed}) == len(users)
    assert {path.name for path in folder.iterdir()} == {line["folder"] for line in listed} | {"users.jsonl"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"store", "exported"}
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    for line in listed:
        assert run("import", "--from", folder / line["folder"], "--user", line["user"], "--store", tmp_path / "new",
                   "--model", bases["decoder"]) == 0  # fmt: skip
        assert torch.equal(Store(tmp_path / "new").get(line["user"], base).row, store.get(line["user"], base).row)
    capsys.readouterr()
    assert run("users", "--store", store.folder) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 + len(users) and "\x1b" not in out and "\0" not in out
