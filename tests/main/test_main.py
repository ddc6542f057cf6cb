"""Does `python -m minipeft` do all it says on every kind of base?"""

import json
import re
from dataclasses import replace

import pytest
import torch
from commands import KINDS, ask, printed, rows_of, run, say
from small_bases import POSITIONS

import minipeft
from minipeft.desk import Desk
from minipeft.engine import Engine
from minipeft.methods import METHODS
from minipeft.methods.lora import LoRA
from minipeft.options import NAMES
from minipeft.running import for_base, open_base, prompts_of
from minipeft.schedule import Job, PassConfig, TrainConfig
from minipeft.stopping import Stop
from minipeft.store import Store
from minipeft.tasks.task import load_task
from minipeft.training import Training, silent


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


# ---- One adapter for all, and each user's own ------------------------------------------------------------------------


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


# ---- Texts that do not fit -------------------------------------------------------------------------------------------


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
