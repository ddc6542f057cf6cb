"""Does `bench peftu` run the whole protocol, continue where it was killed, and meet odd tasks as one would expect?"""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_bases import MAKERS

from minipeft import bench, default_base, flops
from minipeft.engine import Engine
from minipeft.errors import InputError
from minipeft.methods.lora import LoRA
from minipeft.methods.prompt import PromptTuning
from minipeft.models.loading import load_model
from minipeft.models.trunk import Trunk, above_frozen
from minipeft.peftu import cells, cold_start, command, runner
from minipeft.peftu.asking import Asked
from minipeft.peftu.audit import Audit, LeakError
from minipeft.peftu.calls import load_calls
from minipeft.peftu.cells import Cell, Learner
from minipeft.peftu.cold_start import drawn_users, new_users
from minipeft.peftu.protocol import FIXED, MOST_RATES, PAPER, grid_rate
from minipeft.peftu.records import load_records, save_record
from minipeft.peftu.runner import Plan, TaskRun
from minipeft.peftu.settings import load_settings
from minipeft.peftu.tidy import PART, load_tidied, tidied
from minipeft.peftu.untrained import MADE_FROM, Untrained
from minipeft.running import for_base, open_base
from minipeft.schedule import Adapter, TrainConfig
from minipeft.store import Store
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import Example, Task, load_task, save_task
from minipeft.training import EVERYONE

CONFIG = SyntheticConfig(users=5, max_examples=24, test_examples=5, texts=60, max_words=14)
TRAINED = {"lora", "head", "shared", "shared_user"}
GIVEN_UP = "learning rates given up, for somebody could not be trained at them"
UNTRAINED = "users who could not be trained, answered by the start value"


@pytest.fixture(scope="module")
def task():
    return make_synthetic(CONFIG)[0]


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    save_task(task, folder)
    return folder


@pytest.fixture(scope="module")
def bases(task, tmp_path_factory):
    return {kind: MAKERS[kind](task, tmp_path_factory.mktemp(kind)) for kind in ("bert", "t5", "gpt2")}


@pytest.fixture(autouse=True)
def needs_probes():
    for extra in ("sklearn", "matplotlib", "jinja2"):
        pytest.importorskip(extra)


def run(*argv, report=False) -> int:
    """The command; most runs leave out the report, whose pictures take longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        if not report:
            patch.setattr(command, "report_writer", lambda: lambda out: out / "report.html")
        return bench.main(["peftu", *map(str, argv)])


def few(*more):
    return ("--epochs", 1, "--methods", "lora,head", "--lrs", "1e-3,1e-2", *more)


def records_of(out):
    return {(record.name, record.seed): record for record in load_records(out)}


@pytest.fixture(scope="module")
def finished(folder, bases, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert run("--tasks", folder, "--model", bases["bert"], "--seeds", 2, "--out", out, "--cold-start", *few()) == 0
    return out


def test_every_baseline_and_method_has_its_records(finished, task):
    records = records_of(finished)
    assert {name for name, _ in records} == TRAINED | {
        "global_majority", "own_majority", "others_vote", "retrieval", "probe_pooled", "probe_user",
        "probe_pooled_user"}  # fmt: skip
    assert {(name, seed) for name, seed in records if seed} == {(name, 1) for name in TRAINED}
    for (name, seed), record in records.items():
        assert [len(own) for own in record.correct] == [len(task.test[user]) for user in record.users] or (
            name == "others_vote")
        assert record.paper_accuracy == pytest.approx(record.accuracy)  # labels that none contains
        if name in TRAINED:
            assert record.trainable > 0 and record.bytes_per_user >= 4 * record.trainable
            assert record.train_flops_per_user > 1000 * record.trainable
            assert record.train_seconds > 0 and record.kept_bytes_per_row > 4  # at least a number a row
            assert set(record.lr_grid) == ({1e-3, 1e-2} if seed == 0 else {record.chosen_lr})
            assert record.chosen_lr == min(records[name, 0].lr_grid, key=records[name, 0].lr_grid.get)
            assert record.movement["head.weight"]["min"] > 0
            assert [len(curve) for curve in record.val_loss] == [1] * len(task.users)
    assert not any((finished / "adapters").iterdir()), "adapters go once there is a record"


def test_the_result_is_written_and_printed(finished, task, folder, bases, capsys):
    argv = ("--tasks", folder, "--model", bases["bert"], "--seeds", 2, "--out", finished, "--cold-start", *few())
    assert run(*argv, report=True) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((finished / "result.json").read_text())
    names = result["tasks"]["synthetic"]
    assert names["zero_shot"] is None and names["few_shot"] is None
    assert {names[name]["kind"] for name in ("lora", "head", "shared_user")} == {"personal"}
    assert names["shared"]["kind"] == "shared" and names["lora"]["accuracy"] > 0
    audit = result["audit"]["synthetic"]
    assert audit["test_examples_fitted"] == 0 and result["mode"] == "fixed" and result["seeds"] == [0, 1]
    assert audit["fitted_retrieval"] == sum(len(task.train[user]) for user in task.users), "of an earlier call"
    assert "<html" in (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    assert run("--report", finished, report=True) == 0 and (finished / "report.html").exists()


def test_profile_says_where_the_time_goes(finished, folder, bases, capsys):
    """Of every method, without a record or an adapter of it."""
    before = records_of(finished)
    argv = ("--tasks", folder, "--model", bases["bert"], "--seeds", 2, "--out", finished, "--cold-start", *few())
    assert run(*argv, "--profile") == 0
    names = {event.get("name") for event in json.loads((finished / "trace.json").read_text())["traceEvents"]}
    assert {"plan", "forward", "backward", "step"} <= names
    assert "Self CPU" in (finished / "kernels.txt").read_text() and records_of(finished) == before
    assert not any((finished / "adapters").iterdir())


def test_what_is_done_is_not_done_again(finished, folder, bases, monkeypatch):
    monkeypatch.setattr(cells.Timed, "train_step", lambda *args: pytest.fail("trained again"))
    argv = ("--tasks", folder, "--model", bases["bert"], "--out", finished, "--cold-start")
    assert run(*argv, "--seeds", 2, *few()) == 0
    assert run(*argv, "--seeds", 1, *few()) == 0


@pytest.mark.parametrize(("argv", "said"), [
    (["--epochs", "2"], "--epochs was 1 and is 2"), (["--top-layers", "1"], "--top-layers was None and is 1"),
    (["--equal", "parameters", "--methods", "houlsby"], "--equal was '' and is 'parameters'"),
    (["--lrs", "1e-3"], "--lrs was [0.001, 0.01] and is [0.001]"), (["--users", "2"], "the data (--tasks"),
])  # fmt: skip
def test_records_of_other_settings_are_refused(argv, said, finished, folder, bases, capsys):
    assert run("--tasks", folder, "--model", bases["bert"], "--out", finished, *few(), *argv) == 2
    error = capsys.readouterr().err
    assert "made by other settings" in error and said in error and "--out" in error and error.count("\n") == 1


def test_published_and_honest_records_are_not_mixed(finished, folder, bases, capsys):
    argv = ("--tasks", folder, "--model", bases["bert"], "--out", finished, "--epochs", 1, "--methods", "lora,head")
    assert run(*argv, "--mode", "paper") == 2
    assert "--mode was 'fixed' and is 'paper', and 1 more" in capsys.readouterr().err


def test_a_cpu_and_a_gpu_are_not_mixed(finished, folder, bases, tmp_path, capsys):
    """Their seconds, memory and operations would be averaged."""
    out = shutil.copytree(finished, tmp_path / "out")
    known = load_settings(out)
    known["synthetic"]["--device"] = "cuda"
    (out / "settings.json").write_text(json.dumps(known))
    assert run("--tasks", folder, "--model", bases["bert"], "--out", out, *few()) == 2
    assert "--device was 'cuda' and is 'cpu'" in capsys.readouterr().err


def test_a_folder_of_before_settings_were_kept_is_taken_as_it_is(finished, folder, bases, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "settings.json").unlink()
    shutil.rmtree(out / "audit")
    argv = ("--tasks", folder, "--model", bases["bert"], "--out", out, *few())
    assert run(*argv) == 0 and load_settings(out) == load_settings(finished)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["audit"]["synthetic"]["test_examples_fitted"] == 0


def test_a_smaller_request_reads_what_it_asked_for(finished, folder, bases, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    argv = ("--tasks", folder, "--model", bases["bert"], "--out", out, *few(), "--methods", "lora", "--seeds", 1)
    assert run(*argv, report=True) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["seeds"] == [0] and "head" not in result["tasks"]["synthetic"]
    assert all(entry["seeds"] == [0] for entry in result["tasks"]["synthetic"].values() if entry is not None)
    assert "head" in {name for name, _ in records_of(out)}, "what an earlier call made stays"


def test_digests_stay_what_they_were():
    """Of cells of before: adapters and records on disk are found by them."""
    asked = lambda prompt, label: Asked(prompt, label, "u", "1")  # noqa: E731
    learner = Learner("u", [asked((1, 2), 0)], [asked((3,), 1)])
    cell = Cell("lora", TrainConfig(LoRA()), (replace(learner, place=0),))
    assert cell.digest() == "0d598ae3de08ed4d7706df3950bb97c0"
    assert replace(cell, name="shared_user", learners=(learner,), upon=cell).digest() == (
        "f88ff99245f477bf6b3fcd07d8a88d4b")


ADD = Store.add


def kept_adapters(monkeypatch, killed_after=None) -> list:
    """From now on: (store, user) of each adapter that is kept. killed_after: Ctrl-C in place of one more."""
    kept = []

    def add(store, adapter, base):
        if len(kept) == killed_after:
            raise KeyboardInterrupt
        ADD(store, adapter, base)
        kept.append((store.folder, adapter.user))

    monkeypatch.setattr(Store, "add", add)
    return kept


def test_a_killed_run_continues_with_the_same_result(finished, folder, bases, tmp_path, monkeypatch):
    """Killed in the middle of the first fused training: whoever was done is not trained again, nobody differs."""
    kept = kept_adapters(monkeypatch, killed_after=7)
    argv = ("--tasks", folder, "--model", bases["bert"], "--seeds", 1, "--out", tmp_path, *few())
    assert run(*argv) == 130
    stores = {index.parent for index in (tmp_path / "adapters").glob("*/*/index.sqlite")}
    assert {(store, user) for store in stores for user in Store(store).users()} == set(kept)
    again = kept_adapters(monkeypatch)
    assert run(*argv) == 0
    assert not {*kept} & {*again} and len(kept) + len(again) == 3 * 2 * 5 + 2  # methods, rates, users; shared ones
    whole, continued = records_of(finished), records_of(tmp_path)
    for key, record in continued.items():
        assert record.correct == whole[key].correct and record.digest == whole[key].digest, key
        assert record.chosen_lr == whole[key].chosen_lr


def test_cold_start_is_of_new_users_after_k_of_their_own_examples(finished, task):
    new = set(drawn_users(task))
    assert 0 < len(new) < len(task.users)
    untrained = ("own_majority", "retrieval", "probe_user")
    for name in (*TRAINED, *untrained):
        chosen_with = records_of(finished)[name, 0].notes.get(cold_start.CHOSEN_WITH)
        assert chosen_with == (None if name in untrained else len(new))
        curve = records_of(finished)[name, 0].cold_start
        users = records_of(finished)[name, 0].users
        assert all(user in new or value is None for values in curve.values() for user, value in zip(users, values))
        assert (0 in curve) == (name in ("shared", "shared_user", "own_majority"))
        for k in curve:
            enough = {user for user in new if len(task.train[user]) >= k}
            assert {u for u, value in zip(users, curve[k]) if value is not None} == (new if k == 0 else enough)


@pytest.mark.parametrize("name", ["own_majority", "retrieval", "probe_user"])
def test_who_knows_all_of_a_new_users_examples_answers_as_ever(name, finished, task, bases, tmp_path):
    run = TaskRun(Plan(FIXED, {"head": FIXED.methods()["head"]}), tidied(task), open_base(bases["bert"], 2), tmp_path,
                  print, print)  # fmt: skip
    user = task.users[0]
    few, feature = task.subset([user]), Untrained(run).features
    record = records_of(finished)[name, 0]
    assert cold_start._untrained(run, name, few, feature) == {
        user: pytest.approx(record.accuracy[record.users.index(user)])}  # fmt: skip


def test_a_killed_cold_start_continues(finished, folder, bases, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    for record in load_records(out):
        save_record(out, replace(record, cold_start=None))
    argv = ("--tasks", folder, "--model", bases["bert"], "--out", out, "--cold-start", *few())
    kept = kept_adapters(monkeypatch, killed_after=3)
    assert run(*argv) == 130
    again = kept_adapters(monkeypatch)
    assert run(*argv) == 0
    assert again and not {*kept} & {*again} and not any((out / "adapters").iterdir())
    assert records_of(out)["head", 0].cold_start == records_of(finished)["head", 0].cold_start


def test_who_is_new_is_asked_before_anything_is_trained(folder, bases, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--tasks", folder, "--model", bases["bert"], "--out", out, "--users", 1, "--cold-start", *few()) == 2
    assert "needs new users" in capsys.readouterr().err and not out.exists()


def test_new_users_prompts_hold_no_more_than_is_known_of_them(task, bases, tmp_path):
    """As published, with three examples in each prompt."""
    run = TaskRun(Plan(PAPER, {"lora": PAPER.methods()["lora"]}, (42,), epochs=1), tidied(task),
                  open_base(bases["t5"], 2), tmp_path, print, print)  # fmt: skip
    run.chosen = dict.fromkeys(("lora", "shared"), 2e-5)
    new, cells_seen, asked = new_users(run.tidied), [], []

    def train(given, planned=True):
        cells_seen.extend(given)
        return [SimpleNamespace(adapters=dict.fromkeys((*new, EVERYONE))) for _ in given]

    def score(adapters, questions):
        asked.append(questions)
        return {user: np.zeros((len(own), 2)) for user, own in questions.items()}

    heard = task.labels[1]  # while the scores are for the first
    run.train, run.score = train, score
    run.decoded = lambda adapters, questions: ({user: [f"{heard}."] * len(own) for user, own in questions.items()}, 0)
    found = cold_start._curves(run, ("lora", "shared"), new)
    (user,) = new
    right = np.mean([example.label == (heard,) for example in task.test[user]])
    assert right != 0.5 and all(curve == {user: right} for name in found for curve in found[name].values())
    assert [learner.place for cell in cells_seen[1:] for learner in cell.learners] == [
        run.users.index(user)] * (len(cells_seen) - 1), "starts by place, as published"  # fmt: skip
    own = cold_start.in_turn(run.tidied, new)[user]
    said = lambda question: run.asking.prompts.tokenizer.decode(question.prompt)  # noqa: E731
    assert [said(question).count("Text:") for question in asked[0][user]] == [1] * len(task.test[user])
    for cell, questions in zip(cells_seen[1:], asked[1:]):
        (learner,) = cell.learners
        k = len(learner.train)
        later = [example.text for example in own[k:]]
        shots = len({example.label for example in own[:k]})  # one of each label
        for question in (*learner.train, *questions[user]):
            assert said(question).count("Text:") == 1 + shots
            assert not any(f"Text: {text} Label: " in said(question) for text in later)


def test_the_first_examples_are_drawn_unless_the_split_says_which_they_are(task, bases, tmp_path):
    """The published split lists a user's examples label by label: its first ones would teach one label."""
    train = {user: sorted(own, key=lambda example: example.label) for user, own in task.train.items()}
    by_label = replace(task, train=train)
    run = TaskRun(Plan(FIXED, {"head": FIXED.methods()["head"]}), tidied(by_label), open_base(bases["bert"], 2),
                  tmp_path, print, print)  # fmt: skip
    own = cold_start.in_turn(run.tidied, task.users)
    known = {k: cold_start._knowing(run, own, k).task.train for k in (0, 1, 2, 4, 8)}
    for user in task.users:
        assert len({example.label for example in known[8][user]}) == 2
        assert all(known[k][user] == known[8][user][:k] for k in known)
    run.chosen = {"shared": 1e-2}
    new = [user for user in task.users if known[1][user][0].label == ("yes",)][:2]  # in the file the first ones are no
    voted = cold_start._curves(run, ("own_majority",), new)["own_majority"][1]
    assert voted == {user: np.mean([example.label == ("yes",) for example in task.test[user]]) for user in new} != {}
    assert cold_start.in_turn(tidied(by_label.subset(task.users[1:])), task.users[1:2])[task.users[1]] == own[
        task.users[1]], "whoever else there is"  # fmt: skip
    named = tidied(by_label, task.users[:1])
    assert cold_start.in_turn(named, named.new_users) == {task.users[0]: named.task.train[task.users[0]]}


# ---- The default base ----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_default_base(monkeypatch, tmp_path):
    """One that takes a second, in a cache of its own. The tasks that one was asked for."""
    tiny = dict(width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=48, max_positions=64)
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    for name, value in dict(SHAPE=tiny, STEPS=4, TOKENS_PER_STEP=256, VOCAB_SIZE=300).items():
        monkeypatch.setattr(default_base, name, value)
    made_of = []
    make = default_base.default_base
    monkeypatch.setattr(command, "default_base", lambda task, seed: made_of.append(task) or make(task, seed))
    return made_of


def test_the_default_base_is_in_the_audit_and_knows_no_new_user(folder, task, tiny_default_base, tmp_path, capsys):
    out, new = tmp_path / "out", drawn_users(task)
    argv = ("--tasks", folder, "--epochs", 1, "--methods", "lora", "--lrs", "1e-2", "--out", out, "--cold-start")
    assert run(*argv) == 0
    (known,) = tiny_default_base
    assert set(known.users) == {*task.users} - {*new} and new
    examples = len(known.pooled("train"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["audit"]["synthetic"]["fitted_base"] == examples
    assert {name for (name, _), record in records_of(out).items() if MADE_FROM in record.notes} == {"zero_shot"}
    assert records_of(out)["zero_shot", 0].notes[MADE_FROM] == examples


def test_a_test_example_in_the_default_base_is_noticed(task, tiny_default_base, tmp_path):
    user = task.users[0]
    leaky = replace(task, train=task.train | {user: [*task.train[user], task.test[user][0]]})
    args = SimpleNamespace(model=None, out=tmp_path, device="cpu")
    with pytest.raises(LeakError, match=r"base: example .* is a test example"):
        command.bases_of(args, [leaky], {})
    assert not tiny_default_base, "before it was made"


def test_a_named_base_was_not_made_from_the_task(task, bases, tmp_path):
    run_of(task.subset(task.users[:2]), open_base(bases["gpt2"], 2), tmp_path)
    assert MADE_FROM not in records_of(tmp_path)["zero_shot", 0].notes


# ---- Several tasks -------------------------------------------------------------------------------------------------


@pytest.fixture
def other(task, tmp_path):
    """The folder of a second task."""
    save_task(replace(task, name="other"), tmp_path / "other")
    return tmp_path / "other"


def test_what_is_wrong_with_a_later_task_is_said_before_the_first_is_trained(
    finished, folder, other, bases, tmp_path, capsys, monkeypatch
):  # fmt: skip
    monkeypatch.setattr(cells.Timed, "train_step", lambda *args: pytest.fail("trained"))
    out = shutil.copytree(finished, tmp_path / "out")
    argv = ("--tasks", other, folder, "--model", bases["bert"], "--out", out, *few())
    assert run(*argv, "--epochs", 2) == 2
    assert "the records of task 'synthetic' were made by other settings" in capsys.readouterr().err
    assert "other" not in load_settings(out) and not (out / "records" / "other").exists()


def test_a_multi_label_task_needs_a_named_base_and_says_so_at_once(
    folder, task, tiny_default_base, tmp_path, capsys
):  # fmt: skip
    save_task(replace(with_several_labels(task), name="several"), tmp_path / "several")
    assert run("--tasks", folder, tmp_path / "several", "--out", tmp_path / "out", *few()) == 2
    assert "'several' is multi-label" in capsys.readouterr().err
    assert not tiny_default_base and not (tmp_path / "out").exists()


def test_after_each_task_there_are_result_and_report(folder, other, bases, tmp_path, monkeypatch, capsys):
    whole = TaskRun.run

    def killed_later(run, later=0):
        if run.task.name == "other":
            raise KeyboardInterrupt
        whole(run, later)

    out = tmp_path / "out"
    argv = ("--tasks", folder, other, "--model", bases["bert"], "--out", out, "--users", 2, "--top-layers", 1)
    argv = (*argv, "--epochs", 1, "--methods", "head", "--lrs", "1e-2")
    with monkeypatch.context() as patch:
        patch.setattr(TaskRun, "run", killed_later)
        assert run(*argv, report=True) == 130
    result = json.loads((out / "result.json").read_text())
    assert set(result["tasks"]) == set(result["audit"]) == {"synthetic"} and result["to_come"] == ["other"]
    assert "still to come: other" in (out / "report.html").read_text()
    assert run(*argv) == 0
    result = json.loads((out / "result.json").read_text())
    assert set(result["tasks"]) == {"synthetic", "other"} and result["to_come"] == []
    assert len({entries["head"]["accuracy"] for entries in result["tasks"].values()}) == 1, "the same examples"


# ---- How long it takes ---------------------------------------------------------------------------------------------


def test_time_left_is_that_of_all_tasks(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(command, "MINUTE", float("inf"))
    monkeypatch.setattr(command, "time", SimpleNamespace(perf_counter=lambda: now))
    with command.progress({"a": 10, "b": 30}, {"a": 1.0, "b": 1.0}) as (show, update):
        now = 60.0
        show("nothing yet")
        update("a", 5, 10)
        now = 600.0
        show("some")
        update("a", 8, 8)  # some stopped early
        now = 1200.0
        show("a task")
    assert capsys.readouterr().out.splitlines() == [
        "nothing yet (1.0 min)", "some (10.0 min, about 70 min left)", "a task (20.0 min, about 75 min left)"]


def test_a_task_of_longer_texts_takes_longer(task, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(command, "time", SimpleNamespace(perf_counter=lambda: now))
    with command.progress({"a": 10, "b": 10}, {"a": 50.0, "b": 200.0}) as (show, update):
        update("a", 10, 10)
        now = 600.0
        show("a task")
    assert capsys.readouterr().out.splitlines() == ["a task (10.0 min, about 40 min left)"]
    doubled = {user: [replace(each, text=2 * each.text) for each in own] for user, own in task.train.items()}
    assert command.mean_length(replace(task, train=doubled)) == 2 * command.mean_length(task) > 0


def test_what_is_planned_is_what_is_worked_off(task, bases, tmp_path):
    """With one epoch nobody stops early."""
    some, told = tidied(task.subset(task.users[:3])), []
    plan = Plan(FIXED, {"head": FIXED.methods()["head"]}, epochs=1, rates=(1e-2,))
    new = new_users(some)
    later = cold_start.planned_examples(plan, some.task, new)
    run = TaskRun(plan, some, open_base(bases["bert"], 2), tmp_path, lambda line: None, lambda *now: told.append(now))
    run.run(later)
    assert told[-1] == (plan.all_examples(some.task), plan.all_examples(some.task) + later)
    cold_start.cold_start(run, new)
    assert told[-1][0] == told[-1][1] == plan.all_examples(some.task) + later
    assert not any(cold_start.CHOSEN_WITH in record.notes for record in load_records(tmp_path))  # of one none is chosen


# ---- Other bases and modes -----------------------------------------------------------------------------------------


def run_of(task, base, out, plan=None, **changes):
    plan = plan or Plan(FIXED, {"lora": FIXED.methods()["lora"]}, epochs=1, rates=(1e-2,))
    run = TaskRun(replace(plan, **changes), tidied(task), base, out, lambda line: None, lambda done, total: None)
    run.run()
    return run


def test_paper_mode_decodes_and_reads_as_published(task, bases, tmp_path, monkeypatch):
    plan = Plan(PAPER, {name: PAPER.methods()[name] for name in ("lora", "prefix")}, (42,), epochs=1)
    said = {}

    def decoded(run, adapters, questions):
        said.update({user: ["", "yes."] * len(own) for user, own in questions.items()})
        return {user: said[user][: len(own)] for user, own in questions.items()}, 0

    def likeliest(run, scored):
        return {user: [("yes",)] * len(own) for user, own in scored.items()}

    monkeypatch.setattr(TaskRun, "decoded", decoded)
    monkeypatch.setattr(TaskRun, "answers", likeliest)
    run = run_of(task.subset(task.users[:2]), open_base(bases["t5"], 2), tmp_path, plan)
    records = records_of(tmp_path)
    record = records["lora", 42]
    for user, right in zip(record.users, record.correct):
        truths = [example.label[0] for example in task.test[user]]
        assert right == [float(truth == ("no", "yes")[i % 2]) for i, truth in enumerate(truths)]  # "" is "no"
    assert record.paper_accuracy == pytest.approx(record.accuracy)
    assert record.fixed_accuracy == pytest.approx(
        [np.mean([example.label == ("yes",) for example in task.test[user]]) for user in record.users])
    assert record.fixed_accuracy != pytest.approx(record.paper_accuracy)
    assert record.chosen_lr == 2e-5 and record.method["alpha"] == 32 and records["prefix", 42].method["hf_compat"]
    prompt = run.asking.prompts.tokenizer.decode(run.questions("lora")["test"][record.users[0]][0].prompt)
    assert [prompt.count(part) for part in ("Text:", "Label: no.", "Label: yes.")] == [3, 1, 1]
    assert {"zero_shot", "few_shot"} <= {name for name, _ in records}


def test_paper_modes_shared_adapter_is_the_published_lora_whether_or_not_lora_is_asked_for(task, bases, tmp_path):
    plan = Plan(PAPER, {"ia3": PAPER.methods()["ia3"]}, (42,), epochs=1)
    run = TaskRun(plan, tidied(task), open_base(bases["t5"], 2), tmp_path, print, print)
    assert run.shared_method == for_base(PAPER.methods()["lora"], run.base) != for_base(LoRA(), run.base)


def test_paper_mode_asks_untrained_bases_as_published_and_with_four_examples_of_ours(task, bases, tmp_path):
    plan = Plan(PAPER, {"lora": PAPER.methods()["lora"]}, (42,))
    run = TaskRun(plan, tidied(task.subset(task.users[:2])), open_base(bases["t5"], 2), tmp_path, print, print)
    heard = []
    nothing = lambda asked: ({user: [""] * len(own) for user, own in asked.items()}, 0)  # noqa: E731
    run.decoded = lambda adapters, asked: heard.append(asked) or nothing(asked)
    Untrained(run).save_all()
    said = [run.asking.prompts.tokenizer.decode(asked[run.users[0]][0].prompt) for asked in heard]
    counts = [[text.count(f"Label: {label}.") for label in ("no", "yes")] for text in said]
    assert counts == [[1, 1], [2, 2]], "zero-shot, few-shot"


def test_a_t5_is_heard_through_each_users_own_adapter(task, bases, tmp_path):
    """Two users who were taught one label each say it, one of them as far as this small base can spell."""
    taught = dict(zip(task.users, (("yes",), ("no",))))
    train = {user: [replace(example, label=label) for example in task.train[user]] for user, label in taught.items()}
    plan = Plan(FIXED, {"lora": FIXED.methods()["lora"]})
    run = TaskRun(plan, tidied(replace(task.subset(taught), train=train, val=train)), open_base(bases["t5"], 2),
                  tmp_path, print, lambda done, planned: None)  # fmt: skip
    (trained,) = run.train([run.cell("lora", 3e-2, 0)])
    said, silent = run.decoded(trained.adapters, run.questions("lora")["test"])
    assert silent == 0
    one, other = taught
    assert said[one] == ["yes"] * len(task.test[one])
    assert len(said[other]) == len(task.test[other]) and all(text.startswith("n") for text in said[other])


@pytest.mark.parametrize(("name", "most"), [("houlsby", 16), ("lora", 128)])
def test_answers_are_decoded_as_long_as_published(name, most, task, bases, tmp_path, monkeypatch):
    base, heard = open_base(bases["t5"], 2), []
    monkeypatch.setattr(Engine, "generate", lambda engine, asked, tokens: heard.append(tokens) or [[] for _ in asked])
    run = TaskRun(Plan(PAPER, {name: PAPER.methods()[name]}, (42,)), tidied(task), base, tmp_path, print, print)
    method = run.methods[name]
    run.decoded({user: Adapter(user, method, method.initial_row(base, 0, user)) for user in run.users},
                run.asking.questions(method)["test"])  # fmt: skip
    assert heard == [most]


def test_top_layers_of_an_encoder_start_from_kept_states(task, bases, tmp_path, monkeypatch):
    base = open_base(bases["bert"], 2)
    plan = Plan(FIXED, {name: FIXED.methods()[name] for name in ("lora", "prompt")}, epochs=1, rates=(1e-2,))
    run = run_of(task, base, tmp_path, plan, top_layers=1)
    assert "virtual tokens" in run.left_out["prompt"] and set(run.methods) == {"lora"}
    assert {name for name, _ in records_of(tmp_path)} >= {"lora", "shared", "shared_user", "probe_user"}
    assert all(site.startswith("layers.1.") for site in run.base.sites)


def test_heads_are_trained_above_all_layers(task, bases, tmp_path, monkeypatch):
    """By themselves, from states that are computed once; LoRA of all layers is not held up by them."""
    def trained(apart, out):
        if not apart:
            monkeypatch.setattr(cells, "start_layer", lambda base, method=None: 0)
        plan = Plan(FIXED, {name: FIXED.methods()[name] for name in ("lora", "head")}, epochs=2)
        run = TaskRun(plan, tidied(task), open_base(bases["bert"], 2), out, print, lambda done, planned: None)
        return run.train([run.cell(name, 1e-2, 0) for name in ("lora", "head")])

    began, engines, init = [], [], cells.Timed.__init__

    def noted(engine, base, *args):
        init(engine, base, *args)
        engines.append(engine)
        began.append(base.first if isinstance(base, Trunk) else 0)

    monkeypatch.setattr(cells.Timed, "__init__", noted)
    one, other = (trained(apart, tmp_path / str(apart)) for apart in (True, False))
    assert began == [0, 2, 0]
    for cell, again in zip(one, other):
        for user, adapter in cell.adapters.items():
            assert (adapter.row - again.adapters[user].row).norm() <= 1e-5 * adapter.row.norm()
            assert adapter.metrics["seconds"] > 0


def test_lower_layers_are_in_the_seconds_of_each_who_starts_above_them(task, bases, tmp_path, monkeypatch):
    """As each alone would have to run them: 1000 s here, of which the training texts' share counts."""
    now = 0.0

    def slow(*args):
        nonlocal now
        now += 1000.0
        return Trunk(*args)

    monkeypatch.setattr(runner, "Trunk", slow)
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: now))
    run = run_of(task, open_base(bases["bert"], 2), tmp_path, top_layers=1)
    rows = {split: sum(map(len, {question.prompt for own in of_users.values() for question in own}))
            for split, of_users in run.asking.questions().items()}  # fmt: skip
    distinct = {question.prompt for of_users in run.asking.questions().values() for own in of_users.values()
                for question in own}  # fmt: skip
    assert run.lower_seconds == pytest.approx(1000 * rows["train"] / sum(map(len, distinct)))
    assert 0 < run.lower_seconds < 1000
    pays = {name: record.train_seconds >= run.lower_seconds for (name, _), record in records_of(tmp_path).items()}
    assert {name for name, paid in pays.items() if paid} == {"lora", "shared", "probe_pooled", "probe_user",
                                                             "probe_pooled_user"}  # fmt: skip
    assert 0 < records_of(tmp_path)["shared_user", 0].train_seconds, "shared lies under it, and has paid"


@pytest.mark.parametrize("top", [None, 1])
def test_a_head_pays_for_the_states_that_it_starts_from(top, task, bases, tmp_path, monkeypatch):
    """All of them at each learning rate, whoever else is trained, and once: those under it start where they are kept.
    Its counted operations are of its own products alone."""
    now, ran = 0.0, []

    def slow(base, method, texts):
        nonlocal now
        now += 100.0
        base.encoder.embedded = lambda *args, embedded=base.encoder.embedded: ran.append(args) or embedded(*args)
        return above_frozen(base, method, texts)

    plan = Plan(FIXED, {name: FIXED.methods()[name] for name in ("lora", "head")}, epochs=1, top_layers=top)
    run = TaskRun(plan, tidied(task), open_base(bases["bert"], 2), tmp_path, print, lambda done, planned: None)
    run._run_lower_layers()
    monkeypatch.setattr(cells, "above_frozen", slow)
    monkeypatch.setattr(cells, "time", SimpleNamespace(perf_counter=lambda: now))
    lora, *heads = run.train([run.cell("lora", 1e-2, 0), run.cell("head", 1e-3, 0), run.cell("head", 1e-2, 0)])
    assert [each.seconds for each in heads] == pytest.approx([100.0, 100.0]) and lora.seconds == 0
    assert bool(ran) == (top is None), "of the top layers, states are there already"
    monkeypatch.setattr(cells, "above_frozen", above_frozen)
    rows = sum(len(question.prompt) for own in run.questions("head")["train"].values() for question in own)
    mean = rows / sum(map(len, run.task.train.values()))
    head = 2 * 2 * 2 * run.base.config.width  # C = 2 classes, forward and the gradient of W; users fill whole tiles
    assert head <= run._cost("head").flops * mean < 16 * head
    assert run._cost("lora").flops > 100 * run._cost("head").flops


def test_a_finished_tasks_lower_layers_do_not_run_again(task, bases, tmp_path, monkeypatch):
    plan = Plan(FIXED, {"lora": FIXED.methods()["lora"]}, epochs=1, rates=(1e-2,), top_layers=1)
    run_of(task, open_base(bases["bert"], 2), tmp_path, plan)
    monkeypatch.setattr(runner, "Trunk", lambda *args: pytest.fail("ran again"))
    run_of(task, open_base(bases["bert"], 2), tmp_path, plan)
    with pytest.raises(pytest.fail.Exception):
        run_of(task, open_base(bases["bert"], 2), tmp_path, plan, seeds=(0, 1))


def test_texts_whose_states_find_no_room_are_counted(task, bases, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Trunk", lambda base, texts: Trunk(base, texts, most_bytes=4 * 32 * 100))
    run_of(task, open_base(bases["bert"], 2), tmp_path, top_layers=1)
    notes = {name: record.notes for (name, _), record in records_of(tmp_path).items()}
    texts = {example.text for example in task.pooled("train")}
    (number,) = [count for what, count in notes["lora"].items() if "no room" in what]
    assert 0 < number < len(texts) and not any("no room" in what for what in notes["own_majority"])


def with_several_labels(task):
    names = ("anger", "fear", "joy")
    draw = np.random.default_rng(0)
    sets = lambda: tuple(name for name in names if draw.random() < 0.5) or ("joy",)  # noqa: E731
    splits = {name: {user: [replace(e, label=sets()) for e in own] for user, own in task.split(name).items()}
              for name in ("train", "val", "test")}  # fmt: skip
    return replace(task, labels=names, multi_label=True, **splits)


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2"])
def test_several_labels(task, bases, tmp_path, kind):
    """Seven sets can be answered at most; of a test set that nobody gave in training nothing need be known."""
    several = with_several_labels(task)
    run = run_of(several.subset(several.users[:2]), open_base(bases[kind], 3), tmp_path)
    record = records_of(tmp_path)["lora", 0]
    assert set(record.metrics) == {"macro_f1", "micro_f1", "jaccard", "any_hit", "exact"}
    assert record.accuracy == pytest.approx(record.metrics["jaccard"]) == record.fixed_accuracy
    if kind == "bert":  # answered labels, read by their names
        assert record.paper_accuracy == pytest.approx(record.metrics["any_hit"])
    assert ("zero_shot", 0) in records_of(tmp_path) or kind == "bert"
    assert run.audit.report()["test_examples_fitted"] == 0


def test_equal_parameters(task, bases, tmp_path):
    base = open_base(bases["bert"], 2)
    methods = {name: FIXED.methods()[name] for name in ("lora", "houlsby", "prefix", "ia3")}
    plan = Plan(FIXED, methods, equal="parameters")
    run = TaskRun(plan, tidied(task), base, tmp_path, print, print)
    counts = {name: method.parts[0].count(base) for name, method in run.methods.items()}
    smallest = 2 * (4 * (32 + 32) + 2 * (32 + 48))  # a LoRA of rank 1 in two layers
    assert run.shared_method.parts[0] == run.methods["lora"].parts[0]
    assert counts == {"lora": smallest, "ia3": 2 * (32 + 32 + 48), "houlsby": 4 * (7 * 32 + 3), "prefix": 6 * 4 * 32}


def test_what_was_cut_is_noted_of_the_questions_that_were_asked(task, bases):
    """Virtual tokens leave less room for a text: so the prompt's note says, and not those of who asks without any."""
    asking = runner.Asking(open_base(bases["bert"], 2), task, FIXED, Audit(task))
    long = PromptTuning(tokens=asking.base.config.max_positions - 6)
    before = asking.notes_of()
    cut = asking.notes_of(long)["texts shortened"]
    assert cut > before.get("texts shortened", 0) and asking.notes_of() == before
    assert asking.notes_of(long) == {"texts shortened": cut}


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2"])
def test_operations_are_those_of_a_step_whatever_else_is_read(kind, task, bases):
    """Per row of the prompts, times these: a T5 reads targets besides, which cost too."""
    base = open_base(bases[kind], 2)
    asking = runner.Asking(base, task, FIXED, Audit(task))
    questions = asking.questions()["train"][task.users[0]][:4]
    rows = sum(len(question.prompt) for question in questions)
    counted = []
    step = Engine.train_step

    def seen(engine, chosen):
        step(engine, chosen)
        counted.append(current.get_total_flops())

    with pytest.MonkeyPatch.context() as patch:
        current = flops.counter()
        patch.setattr(flops, "counter", lambda: current)
        patch.setattr(Engine, "train_step", seen)
        per_row = cells.cost_per_row(base, asking.prompts.labels, for_base(FIXED.methods()["lora"], base),
                                     questions).flops
    assert len(counted) == 2 and per_row * rows == pytest.approx(counted[1])


def test_operations_of_shared_user_hold_those_of_the_adapter_under_it(task, bases, tmp_path):
    """It acts in every step, beside one of the user's own that is as large as it; the base's are not counted twice."""
    run = TaskRun(Plan(FIXED, {"lora": FIXED.methods()["lora"]}), tidied(task), open_base(bases["gpt2"], 2), tmp_path,
                  print, print)  # fmt: skip
    shared, both = run._cost("shared"), run._cost("shared_user")
    assert shared.flops < both.flops < 2 * shared.flops and shared.kept_bytes < both.kept_bytes < 2 * shared.kept_bytes


def test_operations_of_frozen_layers_are_counted_once_for_each_text(finished, task, bases, tmp_path):
    base = open_base(bases["bert"], 2)
    run = TaskRun(Plan(FIXED, {"head": FIXED.methods()["head"]}), tidied(task), base, tmp_path, print, print)
    cost, asked = run._cost("head"), run.questions("head")["train"].values()
    products = 2 * sum(p.numel() for p in base.encoder.layers.parameters() if p.dim() == 2)
    assert products < cost.frozen_flops < 1.5 * products, "attention besides"
    rows = sum(len(question.prompt) for own in asked for question in own)  # of one epoch
    texts = sum(map(len, (text for own in asked for text in {question.prompt for question in own})))
    record = records_of(finished)["head", 0]
    assert record.train_flops_per_user == pytest.approx(
        (cost.flops * rows + cost.frozen_flops * texts) / len(task.users))  # fmt: skip


def test_what_pytorch_does_not_see_is_what_rows_are_multiplied_by(bases):
    """A head is met by one row of a text, and virtual tokens are rows."""
    base, methods = open_base(bases["bert"], 2), FIXED.methods()
    lora = for_base(methods["lora"], base)
    assert cells.row_flops(base, lora) == 2 * lora.parts[0].count(base) < lora.flops(base)
    for name in ("prompt", "prefix", "ptuning", "head"):
        assert cells.row_flops(base, for_base(methods[name], base)) == 0
    for spoken in ("gpt2", "t5"):
        other = open_base(bases[spoken], 2)
        assert cells.row_flops(other, for_base(methods["lora"], other)) > 0


def test_p_tunings_bytes_are_those_of_its_file(task, bases, tmp_path):
    """The network that writes its tokens is kept with them."""
    base, method = open_base(bases["t5"], 2), FIXED.methods()["ptuning"]
    row = method.initial_row(base, 0, "u")
    store = Store.make(tmp_path, base)
    store.add(Adapter("u", method, row, {}), base)
    store.close()
    size = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size == pytest.approx(4 * method.count(base), rel=0.05)  # the index's pages besides


def test_the_order_that_was_put_in_is_found(bases, tmp_path, capsys):
    """Synthetic users who differ: own adapters beat the shared one, that beats the majority, none beats its ceiling.

    Beyond what chance does: 95 % intervals over users, of the two names' difference or of both apart.
    """
    argv = ("--methods", "lora", "--lrs", "1e-2", "--epochs", 6, "--users", 24, "--out", tmp_path)
    assert run(*argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures, ceilings = result["tasks"]["synthetic"], result["ceilings"]["synthetic"]
    (pair,) = (pair for pair in result["comparisons"] if (pair["a"], pair["b"]) == ("lora", "shared"))
    assert pair["ci"][0] > 0
    for majority in ("global_majority", "own_majority"):
        assert figures["shared"]["ci"][0] > figures[majority]["ci"][1]
    assert ceilings["personal"] > ceilings["shared"]
    for name, ceiling in (("lora", "personal"), ("shared_user", "personal"), ("shared", "shared")):
        assert figures[name]["ci"][0] < ceilings[ceiling]


def test_equal_time_gives_cheap_methods_more_epochs(task, bases, tmp_path):
    plan = Plan(FIXED, {name: FIXED.methods()[name] for name in ("lora", "prefix")}, epochs=8, equal="time")
    run = TaskRun(plan, tidied(task), open_base(bases["bert"], 2), tmp_path, print, print)
    assert run._epochs("lora") == 8 and 1 <= run._epochs("prefix") < 8  # twenty virtual tokens are twenty more rows


def test_equal_time_is_of_the_mean_text_and_has_a_limit(task, bases, tmp_path):
    """Not of whichever comes first: a text as long as this base reads adds a little to the mean."""
    def epochs(task, out):
        plan = Plan(FIXED, {name: FIXED.methods()[name] for name in ("lora", "prefix", "head")}, epochs=8, equal="time")
        run = TaskRun(plan, tidied(task), open_base(bases["bert"], 2), tmp_path / out, print, print)
        return [run._epochs(name) for name in ("lora", "prefix", "head", "shared")]

    user = task.users[0]
    first, *rest = task.train[user]
    longer = replace(task, train=task.train | {user: [replace(first, text=" ".join([first.text] * 20)), *rest]})
    short, long = epochs(task, "short"), epochs(longer, "long")
    assert [short[i] for i in (0, 2, 3)] == [long[i] for i in (0, 2, 3)] == [8, 160, 8]
    assert 1 < short[1] < 8 and abs(short[1] - long[1]) <= 1


# ---- Leaks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "how"), [
    ("adapters", lambda run: run.train([run.cell("lora", 1e-2, 0)])),
    ("adapters", lambda run: run.train([run.cell("shared", 1e-2, 0)])),
    ("prompts", lambda run: run.asking.questions(shots=2)),
    ("answers", lambda run: runner.Asking(run.base, run.task, FIXED, run.audit)),
])  # fmt: skip
def test_a_test_example_in_training_or_prompts_is_noticed(where, how, task, bases, tmp_path):
    kind = "gpt2" if where == "prompts" else "bert"
    run = TaskRun(Plan(FIXED, {"lora": FIXED.methods()["lora"]}), tidied(task), open_base(bases[kind], 2), tmp_path,
                  print, print)  # fmt: skip
    user = run.task.users[0]
    run.task = replace(run.task, train=run.task.train | {user: run.task.train[user] + run.task.test[user][:1]})
    run.asking.task = run.task
    with pytest.raises(LeakError, match=f"{where}: example .* is a test example"):
        how(run)


@pytest.mark.parametrize("name", ["lora", "shared"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_questions_of_test_examples_are_noticed_whoever_hands_them_out(split, name, task, bases, tmp_path, monkeypatch):
    """The task is in order, and still somebody would train on, or stop by, what they are tested on."""
    run = TaskRun(Plan(FIXED, {"lora": FIXED.methods()["lora"]}), tidied(task), open_base(bases["bert"], 2), tmp_path,
                  print, print)  # fmt: skip
    right = TaskRun.questions
    monkeypatch.setattr(TaskRun, "questions", lambda run, name: right(run, name) | {split: right(run, name)["test"]})
    with pytest.raises(LeakError, match=r"adapters: example .* is a test example"):
        run.train([run.cell(name, 1e-2, 0)])


def test_a_test_label_is_in_no_question(task, bases):
    asking = runner.Asking(open_base(bases["gpt2"], 2), task, FIXED, Audit(task))
    assert {q.label for own in asking.questions()["test"].values() for q in own} == {0}


# ---- Odd tasks -----------------------------------------------------------------------------------------------------


def test_users_without_validation_give_a_tenth_of_their_training_examples(task):
    user, other = task.users[:2]
    given = tidied(replace(task, val=task.val | {user: []}))
    own, kept, borrowed = task.train[user], given.task.train[user], given.task.val[user]
    assert len(borrowed) == max(1, round(0.1 * len(own)))
    assert kept == [e for e in own if e in kept] and borrowed == [e for e in own if e not in kept]
    assert given.task.val[other] == task.val[other]
    assert list(given.notes.values()) == [1] and "without validation" in next(iter(given.notes))
    alone = tidied(replace(task, val={user: [] for user in task.users}, train=task.train | {user: own[:1]})).task
    assert alone.train[user] == alone.val[user] == own[:1]


def borrowing(*labels, users=("u",)):
    """Tidied: users who gave these labels to as many texts, in this order, and have no validation example."""
    names = tuple(sorted({name for label in labels for name in label}))
    train = {user: [Example(user, str(i), "x", label) for i, label in enumerate(labels)] for user in users}
    test = {user: [Example(user, "test", "x", labels[0])] for user in users}
    multi = any(len(label) > 1 for label in labels)
    return tidied(Task("t", "?", names, multi, train, {user: [] for user in users}, test)).task


def test_borrowed_validation_is_of_every_label_in_proportion():
    """Whatever the order of the file, which is label by label in the published split."""
    users = [f"u{i}" for i in range(40)]
    given = borrowing(*[("a",)] * 60, *[("b",)] * 39, ("c",), users=users)
    drawn = {user: Counter(example.label[0] for example in given.val[user]) for user in users}
    assert {(count["a"], count["b"], count["c"]) for count in drawn.values()} <= {(5, 5, 0), (6, 4, 0), (7, 3, 0)}
    assert len({tuple(example.id for example in given.val[user]) for user in users}) == len(users), "each their own"
    alone = borrowing(*[("a",)] * 60, *[("b",)] * 39, ("c",), users=users[3:4])
    assert alone.val[users[3]] == given.val[users[3]], "whoever else there is"


def test_no_labels_only_example_is_borrowed():
    for own in ([("a",)] * 2 + [("b",)], [("a", "b"), ("b",), ("b",)], [("a", "b"), ("a",), ("b",)]):
        given = borrowing(*own)
        assert len(given.val["u"]) == 1 and given.val["u"][0] not in given.train["u"]
        assert {name for e in given.train["u"] for name in e.label} == {"a", "b"}
    once = borrowing(("a",), ("b",))
    assert once.val["u"] == once.train["u"], "nothing can be spared"


def test_a_task_without_validation_a_user_with_one_label_and_an_unseen_class(task, bases, tmp_path):
    user = task.users[0]
    odd = replace(task, labels=(*task.labels, "never"), val={user: [] for user in task.users},
                  train=task.train | {user: [replace(e, label=("yes",)) for e in task.train[user]]},
                  test=task.test | {task.users[1]: []})  # fmt: skip
    run_of(odd, open_base(bases["bert"], 3), tmp_path)
    for record in load_records(tmp_path):
        assert task.users[1] not in record.users and len(record.users) == len(task.users) - 1
        notes = " ".join(record.notes)
        for said in ("without validation", "one label", "unseen in training", "without a test"):
            assert said in notes


def test_users_that_were_drawn_are_told(folder, tmp_path):
    """task.json says so where the preparing script drew them."""
    said = "users drawn with seed 42 when the task was prepared"
    for sample, notes in ((None, {}), ({"users": 3, "seed": 42}, {said: 3})):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        header = json.loads((tmp_path / "task.json").read_text())
        (tmp_path / "task.json").write_text(json.dumps(header | {"sample": sample}))
        assert load_tidied(tmp_path).notes == notes
    for wrong, said in (([3], "of type list; needed users and seed"), ({"users": 3}, 'no field "seed"')):
        (tmp_path / "task.json").write_text(json.dumps(header | {"sample": wrong}))
        with pytest.raises(InputError, match=said):
            load_tidied(tmp_path)


def test_a_part_of_a_data_set_is_told(folder, tmp_path):
    """task.json says so where the preparing script found a subset of the raw files."""
    task = load_task(folder)
    texts = len({example.text for name in ("train", "val", "test") for example in task.pooled(name)})
    for subset, notes in ((False, {}), (True, {PART: texts})):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        header = json.loads((tmp_path / "task.json").read_text())
        (tmp_path / "task.json").write_text(json.dumps(header | {"subset": subset}))
        assert load_tidied(tmp_path).notes == notes
    (tmp_path / "task.json").write_text(json.dumps(header | {"subset": "yes"}))
    with pytest.raises(InputError, match="of type str; needed true or false"):
        load_tidied(tmp_path)


def test_own_texts_under_another_id_are_counted(task):
    user = task.users[0]
    (again, *_), test = task.train[user], task.test[user]
    twice = replace(task, test=task.test | {user: [*test, replace(again, id="other")]})
    before = Audit(task).report()["own_texts_test"]
    assert Audit(twice).report()["own_texts_test"] == before + 1


def test_an_empty_test_split_is_an_error(task):
    with pytest.raises(InputError, match="the test split is empty"):
        tidied(replace(task, test={user: [] for user in task.users}))


def test_methods_that_do_not_apply_are_left_out_and_said(folder, bases, tmp_path, capsys):
    argv = ("--tasks", folder, "--model", bases["gpt2"], "--epochs", 1, "--lrs", "1e-2", "--users", 2)
    assert run(*argv, "--methods", "lora,head", "--out", tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert "left out: head" in out
    assert "head" in json.loads(out.splitlines()[-1])["left_out"]["synthetic"]
    assert run(*argv, "--methods", "head", "--out", tmp_path / "b") == 2
    assert "no method applies to this base: head" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "said"), [
    (["--methods", "lora,magic"], "no method is called 'magic'"), (["--methods", ","], "no method"),
    (["--lrs", "0"], "needed learning rates above 0"), (["--lrs", "x"], "needed learning rates above 0"),
    (["--seeds", "0"], "at least 1"), (["--tasks", "nowhere"], "no folder nowhere"),
    (["--mode", "paper", "--lrs", "1e-3"], "one learning rate for all"), (["--users", "99"], "has 5 users"),
    (["--lrs-from", "nowhere"], "no records"), (["--top-layers", "9"], "has 2 layers"),
    (["--split", "strict"], "strict"), (["--instructions", "nowhere.json"], "nowhere.json"),
])  # fmt: skip
def test_bad_options_are_one_line(argv, said, folder, bases, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [] if "--tasks" in argv else ["--tasks", folder]
    assert run(*given, "--model", bases["bert"], "--out", tmp_path / "out", *argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_learning_rate_named_twice_is_tried_once():
    assert command.rates("1e-3,0.01,1e-3,0.001") == (1e-3, 1e-2)


def test_learning_rates_are_tried_or_carried_over(finished, folder, bases, tmp_path, capsys):
    argv = ("--tasks", folder, "--model", bases["bert"], "--lrs-from", finished, "--epochs", 1, "--users", 2)
    assert run(*argv, "--out", tmp_path, "--lrs", "1e-3") == 2
    assert "leave one out" in capsys.readouterr().err
    assert run(*argv, "--out", tmp_path, "--methods", "head,houlsby") == 2
    assert "has chosen no learning rate of houlsby" in capsys.readouterr().err
    assert run(*argv, "--out", tmp_path, "--methods", "head") == 0
    for name in ("head", "shared", "shared_user"):
        (said,) = [note for note in records_of(tmp_path)[name, 0].notes if "carried over" in note]
        assert f"from {finished}: task synthetic, --mode fixed, --epochs 1, the base" in said


def test_an_origin_that_gains_a_method_stops_no_run_that_takes_its_rates(finished, folder, bases, tmp_path, capsys):
    origin, out = shutil.copytree(finished, tmp_path / "origin"), tmp_path / "out"
    argv = ("--tasks", folder, "--model", bases["bert"], "--lrs-from", origin, "--epochs", 1, "--users", 2)
    argv = (*argv, "--out", out)
    assert run(*argv, "--methods", "head") == 0
    kept = load_settings(out)["synthetic"]["--lrs-from"]
    assert set(kept) == {"head", "shared", "shared_user"}
    head = records_of(origin)["head", 0]
    save_record(origin, replace(head, name="houlsby"))
    (origin / "result.json").unlink(missing_ok=True)
    assert run(*argv, "--methods", "head") == 0
    assert run(*argv, "--methods", "lora") == 0
    assert load_settings(out)["synthetic"]["--lrs-from"] == kept | {"lora": records_of(origin)["lora", 0].chosen_lr}
    (said,) = [note for note in records_of(out)["lora", 0].notes if "carried over" in note]
    assert "not finished then" in said
    for seed in (0, 1):
        save_record(origin, replace(records_of(origin)["head", seed], chosen_lr=head.chosen_lr * 3))
    capsys.readouterr()
    assert run(*argv, "--methods", "head") == 2
    assert "--lrs-from was" in capsys.readouterr().err


def test_calls_say_which_of_them_made_what(folder, bases, tmp_path, monkeypatch, capsys):
    argv = ("--tasks", folder, "--model", bases["bert"], "--out", tmp_path, *few("--methods", "head"))
    with monkeypatch.context() as patch:
        patch.setattr(TaskRun, "_record_of", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*argv) == 130
    assert run(*argv) == 0
    first, second = load_calls(tmp_path)
    assert "own_majority-s0" in first["records"]["synthetic"] and "head-s0" not in first["records"]["synthetic"]
    assert second["records"] == {"synthetic": ["head-s0", "shared-s0", "shared_user-s0"]}
    assert 0 < first["seconds"]["synthetic"] and "--methods head" in second["command"] and "torch" in second["versions"]
    assert run(*argv) == 0
    assert load_calls(tmp_path) == [first, second] == json.loads((tmp_path / "result.json").read_text())["calls"]
    (tmp_path / "calls.json").write_text('{"calls": [{}]}')
    capsys.readouterr()
    assert run(*argv) == 2
    assert "calls.json is damaged: needed calls with began, command" in capsys.readouterr().err


def test_a_grid_goes_on_and_a_killed_run_takes_it_up(task, bases, tmp_path, monkeypatch):
    best = grid_rate("head", 2)
    monkeypatch.setattr(cells.Trained, "validation", lambda self: abs(math.log(self.cell.config.learning_rate / best)))
    plan, worked, shown = Plan(FIXED, {"head": FIXED.methods()["head"]}, (0, 1), epochs=1), [], []

    def run_it():
        base, update = open_base(bases["bert"], 2), lambda *counts: worked.append(counts)
        TaskRun(plan, tidied(task), base, tmp_path, shown.append, update).run()

    with monkeypatch.context() as patch:
        patch.setattr(TaskRun, "_record_of", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_it()
    found, trained = {*records_of(tmp_path)}, []
    train = cells.Timed.train
    monkeypatch.setattr(cells.Timed, "train", lambda self, jobs, *more: trained.append(
        {(job.config.seed, job.config.method.name, job.under is None) for job in jobs}) or train(self, jobs, *more))
    run_it()
    assert ("head", 0) not in found and all((seed, under) != (0, True) for jobs in trained for seed, _, under in jobs)
    records = records_of(tmp_path)
    assert list(records["head", 0].lr_grid) == [grid_rate("head", steps) for steps in (-1, 0, 1, 2, 3)]
    assert records["head", 0].chosen_lr == records["head", 1].chosen_lr == best
    assert list(records["head", 1].lr_grid) == [best], "one rate in further seeds"
    assert len(records["shared", 0].lr_grid) == MOST_RATES == len(records["shared_user", 0].lr_grid)
    assert f"synthetic: head: the best learning rate lies at the grid's end; next {best:g}" in shown
    assert worked[-1][0] == worked[-1][1]
    named = Plan(FIXED, {}, rates=(1e-3, 1e-2))
    assert named.beyond("head", 0, {1e-3: 0.5, 1e-2: 0.4}) is None, "of those that a user names, these"


@pytest.mark.parametrize("name", ["..", "../../victim", "a/b"])
def test_a_task_by_any_name_deletes_its_own_adapters_only(name, task, bases, tmp_path):
    other, victim = tmp_path / "out" / "adapters" / "other", tmp_path / "victim"
    other.mkdir(parents=True)
    victim.mkdir()
    run = TaskRun(Plan(FIXED, {"lora": FIXED.methods()["lora"]}), tidied(replace(task, name=name)),
                  open_base(bases["bert"], 2), tmp_path / "out", print, print)  # fmt: skip
    run._adapters_folder.mkdir()
    run.finish()
    assert victim.exists() and [*other.parent.iterdir()] == [other]


def test_a_folder_of_somebody_elses_is_refused(folder, bases, tmp_path, capsys):
    (tmp_path / "report.md").write_text("mine")
    assert run("--tasks", folder, "--model", bases["bert"], "--out", tmp_path) == 2
    assert "not empty and has no records" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


def test_two_tasks_of_one_name_are_refused(folder, bases, tmp_path, capsys):
    assert run("--tasks", folder, folder, "--model", bases["bert"], "--out", tmp_path) == 2
    assert "two are called 'synthetic'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(folder, bases, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert run("--tasks", folder, "--model", bases["bert"], "--out", tmp_path / "file") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_learning_rates_are_carried_over(finished):
    carried, origin = command.carried_from(finished)
    carried = dict(carried)
    assert set(carried) == TRAINED and str(finished) in origin
    assert Plan(FIXED, {}, carried=tuple(carried.items())).grid("lora", True, {}) == [carried["lora"]]


def test_published_instructions_are_taken_word_for_word(task, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"datasets": {"synthetic": {"instruction": "As publishd."}}}))
    assert command.with_instruction(tidied(task), tmp_path / "config.json").task.instruction == "As publishd."
    with pytest.raises(InputError, match=r"no datasets\.other\.instruction"):
        command.with_instruction(tidied(replace(task, name="other")), tmp_path / "config.json")


@pytest.mark.parametrize(("name", "kind"), [("ia3", "attn.k.l"), ("prompt", "prompt")])
def test_weights_in_bf16_lose_small_steps(name, kind, task, bases, tmp_path):
    """The published precision: at its learning rate next to nothing moves. That a drawn start is rounded is no move."""
    base = open_base(load_model(bases["bert"]), 2)
    moved = {}
    for bf16 in (False, True):
        protocol = replace(FIXED, bf16_weights=bf16)
        plan = Plan(protocol, {name: PAPER.methods()[name]}, epochs=1, rates=(2e-5,))
        run = TaskRun(plan, tidied(task), base, tmp_path / str(bf16), print, print)
        trained = run.train([run.cell(name, 2e-5, 0)])
        moved[bf16] = cells.movement(trained[0], base)[kind]["median"]
        row = trained[0].adapters[task.users[0]].row
        assert torch.equal(row, row.bfloat16().float()) == bf16
    assert moved[True] < 0.5 * moved[False]


def test_who_diverges_is_counted_and_stops_nobody(folder, bases, tmp_path, capsys):
    argv = ("--tasks", folder, "--model", bases["bert"], "--out", tmp_path, "--epochs", 1, "--methods", "lora")
    assert run(*argv, "--lrs", "1e-3,1e30") == 0
    record = records_of(tmp_path)["lora", 0]
    assert record.chosen_lr == 1e-3 and record.notes[GIVEN_UP] == 1
    assert run(*argv[:-4], "--out", tmp_path / "all", *argv[-4:], "--lrs", "1e30") == 0
    record = records_of(tmp_path / "all")["lora", 0]
    assert record.notes[UNTRAINED] == CONFIG.users
    assert record.val_loss == [[None]] * CONFIG.users and record.movement["head.weight"]["median"] == 0
    assert records_of(tmp_path / "all")["shared", 0].notes[UNTRAINED] == CONFIG.users  # all answer by its start value
    assert run(*argv[:-6], "--out", tmp_path / "carried", "--lrs-from", tmp_path / "all", "--methods", "lora") == 2
    assert "that run has chosen no learning rate" in capsys.readouterr().err


def test_whom_memory_does_not_hold_has_not_diverged(folder, bases, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise MemoryError

    monkeypatch.setattr(cells.Timed, "train_step", full)
    argv = ("--tasks", folder, "--model", bases["bert"], "--out", tmp_path, "--epochs", 1, "--methods", "head")
    assert run(*argv, "--lrs", "1e-3", "--users", 2) == 0
    said = capsys.readouterr().out
    assert "2 users could not be trained, e.g. user" in said and "does not fit into memory" in said
    assert "diverge" not in said and records_of(tmp_path)["head", 0].notes[UNTRAINED] == 2


def test_who_makes_no_sense_stops_the_run(task, bases, tmp_path):
    run = TaskRun(Plan(FIXED, {"lora": FIXED.methods()["lora"]}), tidied(task), open_base(bases["bert"], 2), tmp_path,
                  print, print)  # fmt: skip
    cell = run.cell("lora", 1e-2, 0)
    with pytest.raises(InputError, match="no validation example"):
        run.train([replace(cell, learners=(*cell.learners[:1], replace(cell.learners[1], val=[])))])


def test_without_a_terminal_there_is_a_line_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(command, "MINUTE", 0.0)
    with command.progress({"a": 100, "b": 50}, {"a": 1.0, "b": 1.0}) as (_, update):
        for done in (10, 20):
            update("a", done, 100)
    assert [line[:7] for line in capsys.readouterr().out.splitlines()] == ["a: 10 %", "a: 20 %"]
