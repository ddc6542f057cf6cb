"""Does `python -m minipeft` do all it says on every kind of base, and does it meet bad input and Ctrl-C well?"""

import io
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_bases import MAKERS, POSITIONS

import minipeft
from minipeft import bench
from minipeft.__main__ import main
from minipeft.desk import Desk
from minipeft.engine import Engine
from minipeft.errors import InputError
from minipeft.methods import METHODS
from minipeft.methods.lora import LoRA
from minipeft.methods.method import method_from
from minipeft.methods.prompt import PromptTuning
from minipeft.models.loading import fingerprint, load_model, load_tokenizer
from minipeft.options import NAMES
from minipeft.running import for_base, open_base, prompts_of
from minipeft.schedule import Job, PassConfig, TrainConfig
from minipeft.stopping import Stop
from minipeft.store import Store
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import Task, load_task, save_task
from minipeft.training import Training, silent

KINDS = list(MAKERS)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task's folder: six users, among them ann and bob."""
    made, _ = make_synthetic(SyntheticConfig(users=6, max_examples=24, test_examples=5, texts=60))
    folder = tmp_path_factory.mktemp("task")
    save_task(made, folder)
    for file in folder.glob("*.jsonl"):
        file.write_text(file.read_text().replace("user00000", "ann").replace("user00001", "bob"))
    return folder


@pytest.fixture(scope="module")
def bases(task, tmp_path_factory):
    """Kind -> a model folder."""
    return {kind: make(load_task(task), tmp_path_factory.mktemp("bases") / kind) for kind, make in MAKERS.items()}


@pytest.fixture(scope="module")
def stores(task, bases, tmp_path_factory):
    """Kind -> a store of everybody's LoRA. Tests read it only."""
    folders = {kind: tmp_path_factory.mktemp("stores") / kind for kind in KINDS}
    for kind, folder in folders.items():
        assert run("train", "--model", bases[kind], "--task", task, "--method", "lora", "--rank", 2, "--store", folder,
                   "--epochs", 2, "--learning-rate", 0.01, "--seed", 3) == 0  # fmt: skip
    return folders


def run(*argv) -> int:
    return main([str(arg) for arg in argv])


def printed(capsys) -> dict:
    """The object on the last line."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def say(monkeypatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def ask(monkeypatch, store, base, lines, *more) -> int:
    say(monkeypatch, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return run("predict", "--store", store, "--model", base, *more)


def rows_of(folder, base) -> dict[str, torch.Tensor]:
    store = Store(folder)
    return {user: store.get(user, base).row for user in store.users()}


# ---- Every command, end to end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_train_gives_everybody_what_the_engine_gives(kind, task, bases, stores, capsys):
    """The same jobs by hand: flags, prompts, heads and the order of users all arrive, to the bit."""
    everybody = load_task(task)
    base = open_base(bases[kind], len(everybody.labels))
    encoded = prompts_of(base, everybody.header).encode(everybody)
    config = TrainConfig(method=for_base(LoRA(rank=2), base), epochs=2, learning_rate=0.01, seed=3)
    jobs = [Job(user, encoded.train[user], encoded.val[user], config) for user in everybody.users]
    jobs.sort(key=lambda job: -len(job.train))
    expected = Engine(base, encoded.labels, PassConfig()).train(jobs)
    store = Store(stores[kind])
    assert store.users() == sorted(everybody.users) and store.task == everybody.header
    for user, adapter in expected.items():
        found = store.get(user, base)
        assert torch.equal(found.row, adapter.row) and found.method == config.method
        assert found.metrics == adapter.metrics and found.under is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_in_a_row(kind, task, bases, tmp_path, capsys, monkeypatch):
    store, base = tmp_path / "store", bases[kind]
    before = {path: path.read_bytes() for path in base.iterdir()}
    assert run("methods", "--model", base, "--json") == 0
    methods = {line["name"]: line for line in printed(capsys)["methods"]}
    assert list(methods) == NAMES
    if kind == "bert":  # 2 FLOPs per number, once for a text
        head = methods["head"]
        assert (head["flops_per_token"], head["flops_per_text"]) == (0, 2 * head["count"])
    assert [name for name in methods if methods[name]["flops_per_text"]] == ["head"] * (kind == "bert")

    assert run("train", "--model", base, "--task", task, "--method", "ia3", "--store", store, "--users", 4,
               "--epochs", 2, "--json") == 0  # fmt: skip
    trained = printed(capsys)
    heads = methods["head"]["count"] if kind == "bert" else 0
    assert trained["adapter_numbers"] == methods["ia3"]["count"] + heads
    assert trained["num_users"] == 4 and trained["base"] == kind and trained["task"] == "synthetic"
    assert trained["num_cut_texts"] == 0

    assert run("users", "--store", store, "--json") == 0
    users = printed(capsys)["users"]
    own = load_task(task).users[:4]
    assert [line["user"] for line in users] == sorted(own)
    assert all(len(line["metrics"]["val_loss"]) == 2 and line["method"] == trained["method"] for line in users)
    title = "ia3+head" if kind == "bert" else "ia3"
    assert trained["method"]["name"] == title
    assert run("users", "--store", store) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{sorted(own)[0]}: {title}, validation loss")

    assert run("eval", "--store", store, "--model", base, "--task", task, "--json") == 0
    result = printed(capsys)
    assert set(result["users"]) == set(own) and len(result["left_out"]) == 2
    assert result["accuracy"]["personal"] == pytest.approx(sum(result["users"].values()) / 4)

    test = load_task(task).test
    lines = [{"user": user, "text": example.text} for user in own for example in test[user]]
    assert ask(monkeypatch, store, base, lines) == 0
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [reply["user"] for reply in replies] == [line["user"] for line in lines]
    for user in own:
        right = [reply["label"] == example.label[0] for reply, example in
                 zip([reply for reply in replies if reply["user"] == user], test[user])]  # fmt: skip
        assert result["users"][user] == pytest.approx(100 * sum(right) / len(right))
    assert {path: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_many_users_through_stdin_get_what_each_gets_alone(kind, task, bases, stores, capsys, monkeypatch):
    everybody = load_task(task)
    lines = [{"user": user, "text": example.text} for user in everybody.users for example in everybody.test[user]]
    lines = lines[::3] + lines[1::3]  # users mixed, several texts each
    assert ask(monkeypatch, stores[kind], bases[kind], lines, "--json") == 0
    *together, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert summary == {"replies": len(lines), "num_cut_texts": 0}
    assert len({json.dumps(reply["scores"]) for reply in together}) > len(lines) / 2  # so the order matters
    for line, reply in list(zip(lines, together))[::4]:
        assert run("predict", "--store", stores[kind], "--model", bases[kind], "--user", line["user"], "--text",
                   line["text"], "--json") == 0  # fmt: skip
        label, alone = capsys.readouterr().out.splitlines()
        alone = json.loads(alone)
        assert alone["user"] == reply["user"] == line["user"] and alone["label"] == reply["label"] == label
        assert alone["scores"] == pytest.approx(reply["scores"], rel=1e-5)


def test_one_users_text_may_come_from_stdin(task, bases, stores, capsys, monkeypatch):
    text = load_task(task).test["ann"][0].text
    one = ["predict", "--store", stores["decoder"], "--model", bases["decoder"], "--user", "ann", "--json"]
    assert run(*one, "--text", text) == 0
    expected = printed(capsys)
    say(monkeypatch, f"{text}\n".encode())
    assert run(*one) == 0 and printed(capsys) == expected


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_trains_where_it_applies_and_says_why_where_not(kind, method, task, bases, tmp_path, capsys):
    assert run("methods", "--model", bases[kind], "--json") == 0
    told = next(line for line in printed(capsys)["methods"] if line["name"] == method)
    code = run("train", "--model", bases[kind], "--task", task, "--method", method, "--store", tmp_path / "store",
               "--users", 2, "--epochs", 1, "--json")  # fmt: skip
    if told["why_not"]:
        assert (method, kind) in {("bitfit", "decoder"), ("bitfit", "t5"), ("head", "decoder"), ("head", "gpt2")}
        assert code == 2 and capsys.readouterr().err == f"minipeft: {told['why_not']}\n"
        assert not (tmp_path / "store").exists()
        return
    assert code == 0 and told["count"] > 0 and told["sites"]
    base = open_base(bases[kind], 2)
    described = printed(capsys)["method"]
    parts = [part["name"] for part in described.get("members", [described])]
    assert parts == ([method, "head"] if kind == "bert" and method != "head" else [method])
    for user, row in rows_of(tmp_path / "store", base).items():
        own = Store(tmp_path / "store").get(user, base).method
        assert not torch.equal(row, own.initial_row(base, 0, user))


def test_methods_names_the_places(bases, capsys):
    assert run("methods", "--model", bases["gpt2"], "--json") == 0
    sites = {line["name"]: line["sites"] for line in printed(capsys)["methods"]}
    assert sites["lora"] == ["q", "k", "v", "o", "up", "down"]  # GPT-2 has no gate
    assert sites["houlsby"] == ["attn", "mlp"] and sites["layernorm"] == ["attn_norm", "mlp_norm", "norm"]
    assert sites["prompt"] == ["embed"] and sites["prefix"] == ["attn"] and sites["head"] == []
    assert run("methods", "--model", bases["gpt2"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(NAMES) and re.fullmatch(r"lora +4,608 +9,216  q, k, v, o, up, down", lines[0])
    assert re.fullmatch(r"prompt +640 +0  embed; 20 more rows for each text", lines[NAMES.index("prompt")])
    assert lines[-1].startswith("head ") and "no place for a head" in lines[-1]


# ---- One adapter for all, and each user's own -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "bert"])
@pytest.mark.parametrize("how", ["on", "from"])
def test_a_shared_adapter_lies_under_or_is_the_start(how, kind, task, bases, tmp_path, capsys):
    common = ["--task", task, "--method", "lora", "--rank", 2, "--epochs", 1, "--learning-rate", 0.02]
    assert run("train", "--model", bases[kind], *common, "--store", tmp_path / "a", f"--{how}-shared") == 0
    config = TrainConfig(method=LoRA(rank=2), epochs=1, learning_rate=0.02)
    plan = Training.plan(bases[kind], task, config, tmp_path / "b", how)
    everyone = plan.train_shared(silent, Desk(plan.store, plan.base, plan.state, plan.ranks, Stop()), Stop())
    alone, labels = [plan.job(user)[0] for user in plan.users], plan.prompts.labels
    pooled = [[question for job in alone for question in split(job)] for split in (lambda j: j.train, lambda j: j.val)]
    one = Job("(everyone)", *pooled, replace(plan.config, epochs=1, batch_size=64))
    assert torch.equal(Engine(plan.base, labels).train([one])["(everyone)"].row, everyone.row)
    jobs = [replace(job, under=everyone) if how == "on" else replace(job, start=everyone.row) for job in alone]
    expected = Engine(plan.base, labels).train(jobs)
    without = Engine(plan.base, labels).train(alone)
    store = Store(tmp_path / "a")
    for user, adapter in expected.items():
        found = store.get(user, plan.base)
        assert torch.equal(found.row, adapter.row) and not torch.equal(found.row, without[user].row)
        assert (found.under is None) == (how == "from")
        if how == "on":
            assert torch.equal(found.under.row, everyone.row) and found.under.method == everyone.method
    if how == "on":
        assert store.get("ann", plan.base).under is store.get("bob", plan.base).under, "so that they share passes"
    assert run("eval", "--store", tmp_path / "a", "--model", bases[kind], "--task", task, "--json") == 0
    whole = load_task(task)
    scored = minipeft.engine.label_scores(plan.base, labels, expected, plan.prompts.encode(whole).test)
    right = [(scores.argmax(1) == [whole.labels.index(e.label[0]) for e in whole.test[user]]).mean()
             for user, scores in scored.items()]  # fmt: skip
    assert printed(capsys)["accuracy"]["personal"] == pytest.approx(100 * sum(right) / len(right))


def test_virtual_tokens_cannot_lie_under_but_can_be_the_start(task, bases, tmp_path, capsys):
    argv = ["train", "--model", bases["decoder"], "--task", task, "--method", "prompt", "--epochs", 1, "--users", 2,
            "--store", tmp_path / "store"]  # fmt: skip
    assert run(*argv, "--on-shared") == 2
    assert "prompt cannot lie under another adapter" in capsys.readouterr().err
    assert run(*argv, "--from-shared") == 0


# ---- Texts that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "bert"])
def test_virtual_tokens_need_positions_too_and_cut_texts_are_counted(kind, task, bases, tmp_path, capsys, monkeypatch):
    store, tokens = tmp_path / "store", POSITIONS - 12
    train = ["train", "--model", bases[kind], "--task", task, "--method", "prompt", "--epochs", 1, "--users", 2]
    assert run(*train, "--tokens", tokens, "--store", store, "--json") == 0
    assert printed(capsys)["num_cut_texts"] > 0
    assert run(*train, "--tokens", 2, "--store", tmp_path / "other", "--json") == 0
    assert printed(capsys)["num_cut_texts"] == 0
    assert run("eval", "--model", bases[kind], "--store", store, "--task", task, "--json") == 0
    assert printed(capsys)["num_cut_texts"] > 0
    lines = [{"user": "ann", "text": "a"}, {"user": "bob", "text": "words " * POSITIONS}]
    assert ask(monkeypatch, store, bases[kind], lines) == 0
    assert [json.loads(line)["was_cut"] for line in capsys.readouterr().out.splitlines()] == [False, True]
    assert run(*train, "--tokens", POSITIONS - 2, "--store", tmp_path / "none") == 2
    assert f"no room for text in {POSITIONS} positions beside {POSITIONS - 2} virtual tokens" in capsys.readouterr().err


def test_a_t5_writes_its_labels_and_reads_any_length(task, bases):
    header, base = load_task(task).header, open_base(bases["t5"], 2)
    prompts = prompts_of(base, header)
    decode = lambda ids: prompts.tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    assert [decode(label) for label in prompts.labels.labels] == ["no</s>", "yes</s>"]
    assert prompts.labels.start == base.config.start_token
    question, was_cut = prompts.question("so be it " * 999)
    assert not was_cut
    assert decode(question.prompt) == f"<s>{header.instruction} Text: {'so be it ' * 999} Label:</s>"


# ---- Stores, interruption and bad input -----------------------------------------------------------------------------


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


def train(task, base, *more):
    return ["train", "--model", base, "--task", task, *more]


def bad_unknown_command(s):
    return ["fly"], "train"


def bad_no_command(s):
    return [], "COMMAND"


def bad_unknown_method(s):
    return train(s.task, s.base, "--method", "laura", "--store", s.new), "pfeiffer"


def bad_option_of_another_method(s):
    return train(s.task, s.base, "--method", "ia3", "--rank", 8, "--store", s.new), (
        "--rank is not an option of method ia3; it has --sites, --inputs")  # fmt: skip


def bad_unknown_option(s):
    return train(s.task, s.base, "--method", "ia3", "--fast", "--store", s.new), "--fast"


def bad_setting(s):
    return train(s.task, s.base, "--method", "ia3", "--epochs", 0, "--store", s.new), "epochs must be at least 1"


def bad_method_value(s):
    return train(s.task, s.base, "--method", "lora", "--rank", 0, "--store", s.new), "rank must be at least 1"


def bad_site(s):
    return train(s.task, s.base, "--method", "lora", "--sites", "query", "--store", s.new), "'query'"


def bad_both_kinds_of_shared(s):
    return train(s.task, s.base, "--method", "lora", "--on-shared", "--from-shared", "--store", s.new), "--from-shared"


def bad_num_users(s):
    return train(s.task, s.base, "--method", "lora", "--users", 7, "--store", s.new), "6 users"


def bad_no_users(s):
    return train(s.task, s.base, "--method", "lora", "--users", 0, "--store", s.new), "--users 0"


def bad_missing_task(s):
    return train(s.tmp / "nowhere", s.base, "--method", "lora", "--store", s.new), "nowhere"


def bad_missing_split(s):
    folder = shutil.copytree(s.task, s.tmp / "task")
    (folder / "val.jsonl").unlink()
    return train(folder, s.base, "--method", "lora", "--store", s.new), "val.jsonl"


def bad_user_without_validation(s):
    folder = shutil.copytree(s.task, s.tmp / "task")
    lines = (folder / "val.jsonl").read_text().splitlines(keepends=True)
    (folder / "val.jsonl").write_text("".join(line for line in lines if '"ann"' not in line))
    return train(folder, s.base, "--method", "lora", "--store", s.new, "--on-bad", "stop"), (
        "user 'ann' has no validation example")  # fmt: skip


def bad_missing_model(s):
    return train(s.task, s.tmp / "nowhere", "--method", "lora", "--store", s.new), "nowhere"


def bad_device(s):
    return [*train(s.task, s.base, "--method", "lora", "--store", s.new), "--device", "tpu"], "--device tpu"


def bad_user_id_too_long(s):
    folder = shutil.copytree(s.task, s.tmp / "task")
    for file in folder.glob("*.jsonl"):
        file.write_text(file.read_text().replace('"bob"', f'"{"b" * 70000}"'))
    return (train(folder, s.base, "--method", "lora", "--on-bad", "stop", "--store", s.new),
            "has 70000 bytes; needed at most 65536")  # fmt: skip


def bad_store_with_these_users(s):
    return train(s.task, s.base, "--method", "lora", "--store", s.store), "already"


def bad_store_of_another_base(s):
    return train(s.task, s.other, "--method", "lora", "--store", s.store), "belongs to base 'decoder' ("


def bad_store_of_another_task(s):
    folder = shutil.copytree(s.task, s.tmp / "task")
    header = json.loads((folder / "task.json").read_text()) | {"name": "other", "instruction": "What else?"}
    (folder / "task.json").write_text(json.dumps(header))
    return train(folder, s.base, "--method", "lora", "--again", "--store", s.store), "'other' has other instruction"


def bad_store_is_a_folder_of_other_things(s):
    return train(s.task, s.base, "--method", "lora", "--store", s.task), "is no store and not empty"


def bad_store_is_a_file(s):
    (s.tmp / "file").write_text("")
    return train(s.task, s.base, "--method", "lora", "--store", s.tmp / "file"), "file"


def bad_predict_with_another_base(s):
    return ["predict", "--store", s.store, "--model", s.other, "--user", "ann", "--text", "a"], "not to 'gpt2' ("


def bad_predict_unknown_user(s):
    return ["predict", "--store", s.store, "--model", s.base, "--user", "zoe", "--text", "a"], "'zoe'"


def bad_predict_without_user(s):
    return ["predict", "--store", s.store, "--model", s.base, "--text", "a"], "--user"


def bad_predict_empty_text(s):
    return ["predict", "--store", s.store, "--model", s.base, "--user", "ann", "--text", " "], "text is empty"


def bad_predict_unknown_user_in_a_line(s):
    lines = b'{"user": "ann", "text": "a"}', b'{"user": "zoe", "text": "a"}'
    return ["predict", "--store", s.store, "--model", s.base], "line 2: no adapter of user 'zoe'", *lines


def bad_predict_line_is_no_json(s):
    return ["predict", "--store", s.store, "--model", s.base], "line 1 is not JSON", b"hello"


def bad_predict_line_without_text(s):
    return ["predict", "--store", s.store, "--model", s.base], 'line 1 has no "text"', b'{"user": "ann"}'


def bad_predict_line_is_a_list(s):
    return ["predict", "--store", s.store, "--model", s.base], 'line 1 has no "user"', b"[1]"


def bad_predict_line_is_not_utf8(s):
    return ["predict", "--store", s.store, "--model", s.base], "line 1 is not JSON in UTF-8", b'{"user": "\xff"}'


def bad_predict_line_with_half_a_character(s):
    line = b'{"user": "ann", "text": "\\ud800"}'
    return ["predict", "--store", s.store, "--model", s.base], "line 1 is not JSON in UTF-8", line


def bad_predict_text_is_not_utf8(s):
    return ["predict", "--store", s.store, "--model", s.base, "--user", "ann"], "the text is not UTF-8", b"\xff"


def bad_eval_with_another_base(s):
    return ["eval", "--store", s.store, "--model", s.other, "--task", s.task], "belongs to base 'decoder' ("


def bad_eval_of_nobody(s):
    everybody = load_task(s.task)
    rename = lambda split: {f"{user}!": [replace(e, user=f"{user}!") for e in examples]  # noqa: E731
                            for user, examples in split.items()}  # fmt: skip
    strangers = Task(everybody.name, everybody.instruction, everybody.labels, False,
                     *(rename(everybody.split(name)) for name in ("train", "val", "test")))  # fmt: skip
    save_task(strangers, s.tmp / "task")
    return ["eval", "--store", s.store, "--model", s.base, "--task", s.tmp / "task"], "has both an adapter"


def bad_eval_no_store(s):
    return ["eval", "--store", s.tmp, "--model", s.base, "--task", s.task], "is no store"


def bad_users_no_store(s):
    return ["users", "--store", s.tmp / "nowhere"], "is no store"


def bad_users_broken_store(s):
    (s.tmp / "index.sqlite").write_text("SQLite format 3")
    return ["users", "--store", s.tmp], "index.sqlite is damaged"


def bad_users_of_the_old_layout(s):
    (s.tmp / "store.json").write_text("{}")
    return ["users", "--store", s.tmp], "a store of an earlier minipeft"


def bad_store_no_store(s):
    return ["store", "verify", "--store", s.tmp / "nowhere"], "is no store"


def bad_store_unknown_action(s):
    return ["store", "burn", "--store", s.store], "verify"


def bad_store_delete_nobody(s):
    return ["store", "delete", "--store", s.store], "store delete takes a --user"


def bad_store_compact_somebody(s):
    return ["store", "compact", "--store", s.store, "--user", "ann"], "store compact takes no --user"


def bad_store_delete_unknown_user(s):
    return ["store", "delete", "--store", s.store, "--user", "zoe"], "'zoe'"


def bad_rows(s):
    return train(s.task, s.base, "--method", "lora", "--rows", "fp4", "--store", s.new), "'fp4'"


def bad_other_rows(s):
    return train(s.task, s.base, "--method", "lora", "--again", "--rows", "int8", "--store", s.store), "keeps rows as"


def bad_methods_no_model(s):
    return ["methods", "--model", s.tmp], "config.json"


def bad_export_unknown_user(s):
    return ["export", "--store", s.store, "--user", "zoe", "--to", s.new, "--format", "peft"], "'zoe'"


def bad_export_format(s):
    return ["export", "--store", s.store, "--user", "ann", "--to", s.new, "--format", "zip"], "peft"


BAD = {name: function for name, function in globals().items() if name.startswith("bad_")}


def content(store):
    """What a store holds; how SQLite shares it out among its own files is SQLite's affair."""
    files = {path: path.read_bytes() for path in store.rglob("*") if path.is_file() and "index.sqlite" not in path.name}
    with closing(sqlite3.connect(store / "index.sqlite")) as index:
        return files, list(index.iterdump())


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_and_exit_code_2(make, task, bases, stores, tmp_path, capsys, monkeypatch, fake):
    base, store = bases["decoder"], stores["decoder"]
    before = content(store)
    argv, named, *lines = make(SimpleNamespace(task=task, base=base, other=bases["gpt2"], store=store, tmp=tmp_path,
                                               new=tmp_path / "new"))  # fmt: skip
    say(monkeypatch, b"\n".join(lines))
    assert run(*argv) == 2
    streams = capsys.readouterr()
    assert streams.err.count("\n") == 1 and streams.err.startswith("minipeft: ") and named in streams.err, streams.err
    assert "hello" not in streams.err and streams.out == ""
    assert content(store) == before
    assert not (tmp_path / "new").exists()


def test_the_command_itself_exits_with_2_and_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, "-m", "minipeft", "users", "--store", str(tmp_path)], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("minipeft: ")


def test_a_reader_that_goes_away_is_no_error(stores):
    command = [sys.executable, "-m", "minipeft", "users", "--store", str(stores["decoder"])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_help_has_a_line_for_each_method(capsys):
    with pytest.raises(SystemExit) as ended:
        run("train", "--help")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    for name in NAMES:
        assert f"  {name:<10} {METHODS[name].summary}" in lines
    assert any("with --model FOLDER on the line" in line for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_help_counts_each_method_on_the_model_at_hand_by_its_config_alone(kind, bases, tmp_path, capsys):
    assert run("methods", "--model", bases[kind], "--json") == 0
    told = printed(capsys)["methods"]
    (tmp_path / "config.json").write_bytes((bases[kind] / "config.json").read_bytes())
    with pytest.raises(SystemExit) as ended:
        run("train", "--method", "lora", "--model", tmp_path, "--help")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    for line in told:
        count = "-" if line["count"] is None else f"{line['count']:,}"
        assert f"  {line['name']:<10} {count:>12}  {METHODS[line['name']].summary}" in lines
    assert run("train", "--help", "--model", tmp_path / "nowhere") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


# ---- Other libraries' files -----------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """Stands for minipeft.interop: keeps adapters in memory by folder."""
    kept = {}
    module = SimpleNamespace(
        export_peft=lambda adapter, base, folder: kept.__setitem__(str(folder), (adapter, type(base).__name__)),
        import_peft=lambda folder, base, user: replace(kept[str(folder)][0], user=user),
        export_adapterhub=None, import_adapterhub=None, kept=kept,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "minipeft.interop", module)
    monkeypatch.setattr(minipeft, "interop", module, raising=False)
    return module


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


# ---- From Python, and as the README has it --------------------------------------------------------------------------


def test_python_does_what_the_command_does(task, bases, stores, tmp_path):
    base, finished = load_model(bases["decoder"]), []
    before = fingerprint(base)
    store = minipeft.train(base, task, LoRA(rank=2), store=tmp_path / "store", epochs=2, learning_rate=0.01, seed=3,
                           on_finish=lambda adapter: finished.append(adapter.user))  # fmt: skip
    expected = rows_of(stores["decoder"], base)
    assert sorted(finished) == store.users()
    assert all(torch.equal(row, expected[user]) for user, row in rows_of(tmp_path / "store", base).items())
    result = minipeft.evaluate(base, store, load_task(task))
    assert minipeft.evaluate(bases["decoder"], stores["decoder"], task) == result
    text = load_task(task).test["ann"][0].text
    (ann, bob) = minipeft.predict(base, store, [("ann", text), ("bob", text)])
    assert ann.user == "ann" and bob.scores != ann.scores and ann.label == max(ann.scores, key=ann.scores.get)
    store.delete("ann")
    assert "ann" not in store and "bob" in store and len(store.users()) == 5
    with pytest.raises(InputError, match="no adapter of user 'ann'"):
        minipeft.predict(base, store, [("ann", text)])
    with pytest.raises(InputError, match="no adapter of user 'ann'"):
        store.delete("ann")
    assert fingerprint(base) == before


def test_python_refuses_what_it_cannot_do(task, bases, tmp_path):
    base = open_base(bases["decoder"], 2)
    with pytest.raises(InputError, match="shared is 'above'"):
        minipeft.train(base, task, store=tmp_path / "store", shared="above")
    with pytest.raises(TypeError, match="steps"):
        minipeft.train(base, task, store=tmp_path / "store", steps=3)
    base.origin = None
    with pytest.raises(InputError, match="Decoder came from no folder"):
        minipeft.train(base, task, store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_methods_default_sites_are_those_the_base_has(bases):
    gpt2, llama = (open_base(bases[kind], 2) for kind in ("gpt2", "decoder"))
    assert for_base(LoRA(), llama) == LoRA()
    assert for_base(LoRA(), gpt2) == LoRA(sites=("q", "k", "v", "o", "up", "down"))
    chosen = LoRA(sites=("q", "gate"))
    assert for_base(chosen, gpt2) == chosen, "what was chosen is refused by check, not left out"
    spelled_out = for_base(LoRA(sites=tuple(LoRA().sites)), gpt2)
    with pytest.raises(InputError, match="no site of this base is called 'gate'"):
        spelled_out.check(gpt2)
    assert for_base(PromptTuning(), gpt2) == PromptTuning()


def test_the_readmes_commands_and_python_run(task, bases, tmp_path, capsys, monkeypatch, fake):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases["decoder"], "base")
    shutil.copytree(task, "task")
    Path("questions.jsonl").write_text('{"user": "bob", "text": "a"}\n{"user": "ann", "text": "b"}\n')
    readme = (Path(__file__).parent.parent / "README.md").read_text().split("## Use it")[1].split("\n## ")[0]
    assert f"# {len(NAMES)} methods" in readme
    shell, python, _ = re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in shell.splitlines()]
    assert {words[3] for words in commands} == {"methods", "train", "users", "eval", "predict", "export", "import",
                                                "store"}  # fmt: skip
    for words in commands:
        assert words[:3] == ["python", "-m", "minipeft"]
        if "<" in words:
            monkeypatch.setattr(sys, "stdin", open(words[-1]))
            words = words[: words.index("<")]
        assert run(*words[3:]) == 0, capsys.readouterr().err
    exec(python, {})
    assert {path.name for path in tmp_path.iterdir()} >= {"store", "python-store"}


def test_prompts_start_from_a_text(bases, task, tmp_path, capsys):
    argv = ("train", "--model", bases["decoder"], "--task", task, "--users", 1, "--epochs", 1, "--learning-rate", 1e-9,
            "--weight-decay", 0)  # fmt: skip
    assert run(*argv, "--method", "prompt", "--tokens", 9, "--start-text", "so be it", "--store", tmp_path / "a") == 0
    base, tokenizer = open_base(bases["decoder"], 2), load_tokenizer(bases["decoder"])
    ids = tokenizer.encode("so be it", add_special_tokens=False).ids
    ((user, row),) = rows_of(tmp_path / "a", base).items()
    method = Store(tmp_path / "a").get(user, base).method
    expected = base.embed.weight[torch.tensor((ids * 9)[:9])]
    torch.testing.assert_close(method.tensors(row, base)["prompt"], expected, atol=1e-6, rtol=0)
    capsys.readouterr()
    prompt = ("--method", "prompt")
    for options, message in ((("--method", "lora", "--start-text", "so"), "is an option of --method prompt"),
                             ((*prompt, "--tokens", 1, "--start-text", "so be it, said they"), "raise tokens"),
                             ((*prompt, "--start-from", "text", "--text", 10**6), "token ids 1000000"),
                             (("--method", "lora", "--ranks", "zzz=4"), "'zzz' has a rank or alpha of its own"),
                             (("--method", "houlsby", "--reduction", 0), "reduction is 0"),
                             (("--method", "houlsby", "--reduction", "nan"), "reduction is nan"),
                             (("--method", "lora", "--dropout", 0.001), "in steps of 1/256")):
        assert run(*argv[:9], *options, "--store", tmp_path / "b") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_an_imported_adapter_is_evaluated_on_the_task_given(bases, task, tmp_path, capsys):
    """And a folder that is refused leaves no store behind."""
    base, store, new = bases["decoder"], tmp_path / "store", tmp_path / "new"
    argv = ("train", "--model", base, "--task", task, "--method", "lora", "--users", 1, "--epochs", 1)
    assert run(*argv, "--store", store) == 0
    (user,) = Store(store).users()
    folder = tmp_path / "exported"
    assert run("export", "--store", store, "--user", user, "--to", folder, "--format", "peft") == 0
    assert run("import", "--from", folder, "--user", user, "--store", new, "--model", bases["t5"]) == 2
    assert run("import", "--from", tmp_path / "nowhere", "--user", user, "--store", new, "--model", base) == 2
    assert not new.exists()
    assert run("import", "--from", folder, "--user", user, "--store", new, "--model", base) == 0
    capsys.readouterr()
    results = []
    for one in (store, new):
        assert run("eval", "--store", one, "--model", base, "--task", task, "--json") == 0
        results.append(printed(capsys))
    assert results[0] == results[1]
    (tmp_path / "file").write_text("")
    assert run("export", "--store", store, "--user", user, "--to", tmp_path / "file" / "x", "--format", "peft") == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_warning_is_one_line_on_stderr(bases, tmp_path, capsys):
    folder = shutil.copytree(bases["bert"], tmp_path / "base")
    weights = {f"bert.{key}": weight for key, weight in load_file(folder / "model.safetensors").items()}
    weights["bert.embeddings.word_embeddings.weight"][3, :2] = torch.nan
    save_file(weights | {"cls.predictions.bias": torch.zeros(400)}, folder / "model.safetensors")
    assert run("methods", "--model", folder) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"minipeft: {folder}: ") for line in lines)
    assert "2 numbers in 1 tensors are NaN" in lines[0] and "1 tensors of heads are not used (cls)" in lines[1]


def test_a_store_remembers_how_texts_are_pooled(task, bases, tmp_path, capsys):
    base, store = load_model(bases["bert"]), tmp_path / "store"
    assert run("train", "--model", bases["bert"], "--task", task, "--method", "lora", "--store", store, "--users", 2,
               "--epochs", 1, "--pooling", "pooler", "--recompute") == 0  # fmt: skip
    assert Store(store).pooling == "pooler"
    assert run("predict", "--store", store, "--model", bases["bert"], "--user", "ann", "--text", "a", "--json") == 0
    scores = printed(capsys)["scores"]
    with closing(sqlite3.connect(store / "index.sqlite", isolation_level=None)) as index:
        index.execute("UPDATE about SET value = 'mean' WHERE name = 'pooling'")
    assert run("predict", "--store", store, "--model", bases["bert"], "--user", "ann", "--text", "a", "--json") == 0
    assert printed(capsys)["scores"] != scores
    with pytest.raises(InputError, match="belongs to pooling 'mean', not 'pooler'"):
        Store(store).get("ann", open_base(base, 2, "pooler"))
    assert run("train", "--model", bases["gpt2"], "--task", task, "--method", "lora", "--store", tmp_path / "other",
               "--pooling", "pooler") == 2  # fmt: skip
    assert "pooling 'pooler' is for encoders" in capsys.readouterr().err


def test_dtype_pooling_and_recompute_reach_training(task, bases, tmp_path, capsys, monkeypatch):
    def stop(self, *args, **options):
        raise InputError(f"{self.model.dtype}, {self.model.pooling}, {self.passes.recompute}")

    monkeypatch.setattr(Engine, "run", stop)
    common = "--model", bases["bert"], "--task", task, "--users", 2
    chosen = "--dtype", "bfloat16", "--pooling", "pooler", "--recompute"
    for options, expected in (((), "torch.float32, mean, False"), (chosen, "torch.bfloat16, pooler, True")):
        store = tmp_path / f"store {len(options)}"
        assert run("train", *common, "--method", "lora", "--store", store, *options) == 2
        assert capsys.readouterr().err == f"minipeft: {expected}\n"
        assert bench.main([str(arg) for arg in (*common, "--out", tmp_path / "out", *options)]) == 2
        assert capsys.readouterr().err == f"minipeft.bench: {expected}\n"


def test_a_bf16_base_trains_and_answers_in_bf16_alone(task, bases, tmp_path, capsys):
    store, model = tmp_path / "store", ("--model", bases["decoder"])
    assert run("train", *model, "--task", task, "--method", "lora", "--store", store, "--users", 2, "--epochs", 1,
               "--dtype", "bfloat16") == 0  # fmt: skip
    ask_ann = "predict", *model, "--store", store, "--user", "ann", "--text", "a"
    assert run(*ask_ann, "--dtype", "bfloat16") == 0
    assert run("eval", *model, "--store", store, "--task", task, "--dtype", "bfloat16") == 0
    capsys.readouterr()
    assert run(*ask_ann) == 2 and "in the dtype that it had" in capsys.readouterr().err
    assert run(*ask_ann, "--dtype", "float16") == 2
    assert "'float16' is none of float32, bfloat16; fp16 passes its range" in capsys.readouterr().err
