"""Does a training that is interrupted, poisoned or spread over processes give everybody the same adapter to the bit?"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_bases import make_decoder

import minipeft
from minipeft import ranks as ranks_module
from minipeft import resume
from minipeft import training as training_module
from minipeft.__main__ import main
from minipeft.desk import Desk
from minipeft.engine import Engine
from minipeft.errors import InputError
from minipeft.log import Log
from minipeft.methods.lora import LoRA
from minipeft.models.loading import load_model
from minipeft.ranks import Ranks, share_out
from minipeft.resume import State, packed, unpacked
from minipeft.schedule import PLACE, Adapter, Fault, PassConfig, Standing, TrainConfig
from minipeft.stopping import Stop
from minipeft.store import Store
from minipeft.tasks.folder import TaskFolder
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import load_task, save_task
from minipeft.training import MOST_EPOCHS, Interrupted, Training

CONFIG = TrainConfig(LoRA(rank=2, dropout=0.25, sites=("v",)), learning_rate=0.02, epochs=3, batch_size=4, patience=1)
EXACT = PassConfig(slots=3, token_budget=300, deterministic=True)
NUM_USERS = 8


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    made, _ = make_synthetic(SyntheticConfig(users=NUM_USERS, max_examples=40, test_examples=5, texts=60))
    folder = tmp_path_factory.mktemp("task")
    save_task(made, folder)
    return folder


@pytest.fixture(scope="module")
def model(task, tmp_path_factory):
    return make_decoder(load_task(task), tmp_path_factory.mktemp("bases") / "decoder")


@pytest.fixture(scope="module")
def base(model):
    return load_model(model)


@pytest.fixture(scope="module")
def whole(task, base, tmp_path_factory):
    """What a training gives that nothing interrupts."""
    return trained(base, task, tmp_path_factory.mktemp("whole") / "store")


def trained(base, task, store, shared="", config=CONFIG, **how):
    """Train and return every adapter of the store, with the summary under ""."""
    plan = Training.plan(base, task, config, store, shared, passes=EXACT, **how)
    return adapters(plan.run() and store, base)


def adapters(folder, base):
    store = Store(folder)
    return {user: store.get(user, base) for user in store.users()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for user in one:
        assert torch.equal(one[user].row, other[user].row), user
        assert one[user].metrics == other[user].metrics, user


@pytest.fixture
def stop_after(monkeypatch):
    """A function: from now on, whoever trains is sent a signal after so many passes."""
    run, sigint = Engine.run, signal.signal(signal.SIGINT, signal.default_int_handler)

    def arm(passes, signum=signal.SIGTERM):
        def interrupted(engine, jobs):
            for number, done in enumerate(run(engine, jobs), start=1):
                if number == passes:
                    os.kill(os.getpid(), signum)
                yield done

        monkeypatch.setattr(Engine, "run", interrupted)

    yield arm
    signal.signal(signal.SIGINT, sigint)


def log_of(store, event):
    lines = map(json.loads, (Path(store) / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


# ---- Resume --------------------------------------------------------------------------------------------------------


def test_interrupted_again_and_again_it_gives_the_same_bits(task, base, whole, tmp_path, stop_after):
    """Three passes at a time, in other company each time; Ctrl-C and SIGTERM in turns."""
    store, interruptions = tmp_path / "store", 0
    while True:
        stop_after(3, (signal.SIGTERM, signal.SIGINT)[interruptions % 2])
        passes = replace(EXACT, slots=1 + interruptions % 4, token_budget=(300, 1, 150)[interruptions % 3])
        plan = Training.plan(base, task, CONFIG, store, passes=passes, resume=True)
        try:
            summary = plan.run()
            break
        except Interrupted as stopped:
            assert stopped.signum == (signal.SIGTERM, signal.SIGINT)[interruptions % 2]
            interruptions += 1
    assert interruptions >= 8
    assert_same(adapters(store, base), whole)
    assert summary.trained + summary.skipped == NUM_USERS and summary.skipped > 0
    assert len({line["user"] for line in log_of(store, "finished")}) == len(log_of(store, "finished")) == NUM_USERS
    assert not list((store / "training").glob("rank-*"))
    Store(store).delete("user00003")
    assert Training.plan(base, task, CONFIG, store, passes=EXACT, resume=True).run().skipped == NUM_USERS
    assert "user00003" not in Store(store), "who was deleted does not come back"


@pytest.mark.parametrize("shared", ["on", "from"])
@pytest.mark.parametrize("passes", [1, 6])
def test_a_shared_adapter_is_trained_once(task, base, tmp_path, stop_after, monkeypatch, shared, passes):
    """Interrupted in the middle of it, and after it. A user is called what the job of the shared one is."""
    task = edited(task, tmp_path / "task", lambda line: line | {"user": "(everyone)"}, splits=("train", "val"))
    expected = trained(base, task, tmp_path / "whole", shared)
    store, steps = tmp_path / "store", []
    stop_after(passes)
    with pytest.raises(Interrupted):
        trained(base, task, store, shared)
    stop_after(0)
    train_shared = Training.train_shared
    monkeypatch.setattr(Training, "train_shared", lambda *args: steps.append(1) or train_shared(*args))
    assert_same(trained(base, task, store, shared, resume=True), expected)
    assert len(steps) == (passes == 1)
    if shared == "on":
        found = adapters(store, base)
        assert all(torch.equal(found[user].under.row, expected[user].under.row) for user in expected)


def test_what_is_under_way_is_saved_now_and_then_too(task, base, whole, tmp_path, monkeypatch):
    """Killed without a word: whoever was saved goes on from there."""
    store, run = tmp_path / "store", Engine.run

    def killed(engine, jobs):
        for number, done in enumerate(run(engine, jobs)):
            if number == 12:
                raise SystemExit  # as if the power went
            yield done

    monkeypatch.setattr(Engine, "run", killed)
    with pytest.raises(SystemExit):
        trained(base, task, store, save_minutes=1e-9)
    monkeypatch.setattr(Engine, "run", run)
    plan = Training.plan(base, task, CONFIG, store, passes=EXACT, resume=True)
    stood = plan.state.standings(set(plan.users))
    assert len(stood) == EXACT.slots and max(standing.place["step"] for standing in stood.values()) > 1
    with open(store / "training" / "done.jsonl", "ab") as file:
        file.write(b'["torn')
    plan.run()
    assert_same(adapters(store, base), whole)
    assert State(store).done() == dict.fromkeys(whole, "")


@pytest.mark.parametrize("calls", [1, 12, 40])
def test_a_full_disk_is_one_line_and_nobody_is_lost(task, base, whole, tmp_path, monkeypatch, calls):
    """Whatever was to be flushed to it then: the state, who is done, or the store."""
    store, fsync, left, told = tmp_path / "store", os.fsync, [calls], []

    def full(descriptor):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    plan = Training.plan(base, task, CONFIG, store, passes=EXACT, resume=True, save_minutes=1e-9)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError) as raised:
        plan.run(lambda adapter: told.append(adapter.user))
    monkeypatch.setattr(os, "fsync", fsync)
    assert "\n" not in str(raised.value)
    found = adapters(store, base)
    assert set(told) <= found.keys() and all(torch.equal(found[user].row, whole[user].row) for user in found)
    assert_same(trained(base, task, store, resume=True), whole)


def interrupted_store(base, task, store, stop_after, **how):
    stop_after(8)
    with pytest.raises(Interrupted):
        trained(base, task, store, **how)
    stop_after(0)
    return store


def test_another_training_is_not_gone_on_with(task, model, base, tmp_path, stop_after):
    store = interrupted_store(base, task, tmp_path / "store", stop_after)
    other_task = shutil.copytree(task, tmp_path / "task")
    with open(other_task / "train.jsonl", "a") as file:
        line = json.loads((task / "train.jsonl").read_text().splitlines()[0])
        file.write(json.dumps(line | {"id": "new"}) + "\n")
    other_base = load_model(make_decoder(load_task(task), tmp_path / "other", seed=1))
    cases = {
        "learning_rate was 0.02 when its training began, now it is 0.01": (base, task, {"learning_rate": 0.01}, {}),
        "method was .*'rank': 2": (base, task, {"method": replace(CONFIG.method, rank=4)}, {}),
        "the task's examples was": (base, other_task, {}, {}),
        "the base was": (other_base, task, {}, {}),
        "deterministic mode was True": (base, task, {}, {"passes": PassConfig()}),
        "what is shared was": (base, task, {}, {"shared": "from"}),
    }  # fmt: skip
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    for message, (own_base, own_task, settings, how) in cases.items():
        with pytest.raises(InputError, match=message):
            Training.plan(own_base, own_task, replace(CONFIG, **settings), store,
                          **{"passes": EXACT, "resume": True, **how})  # fmt: skip
    with pytest.raises(InputError, match="interrupted; go on with --resume, or start over with --again"):
        trained(base, task, store)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_a_damaged_state_is_an_error_that_says_how_to_go_on(task, base, whole, tmp_path, stop_after):
    store = interrupted_store(base, task, tmp_path / "store", stop_after)
    (path,) = (store / "training").glob("rank-*")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    for damaged in (content, content[:-9], b"", b"\xff" * 99):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged"):
            trained(base, task, store, resume=True)
    run = store / "training" / "run.json"
    right = run.read_bytes()
    no_run = json.dumps(json.loads(right) | {"run": 3}).encode()
    for damaged in (right[:-9], b"[]", b"3", b"{}", no_run):
        run.write_bytes(damaged)
        with pytest.raises(InputError, match=r"run\.json is damaged"):
            trained(base, task, store, resume=True)
    run.write_bytes(right)
    path.unlink()
    assert_same(trained(base, task, store, resume=True), whole)


def test_of_two_standings_of_a_user_the_later_counts(tmp_path):
    """One saved by two processes, one by three, in either order of the files' names."""
    state = State(tmp_path)

    def at(step):
        numbers = {name: torch.full((64,), float(step)) for name in ("row", "exp_avg", "exp_avg_sq")}
        return Standing({**dict.fromkeys(PLACE, 0), "history": [], "step": step}, numbers)

    state.save("rank-0-of-2", 2, [("ann", at(5)), ("bob", at(3))])
    state.save("rank-1-of-3", 3, [("ann", at(3)), ("bob", at(5)), ("zoe", at(5))])
    state.name = "another training's"
    state.save("rank-2-of-3", 1, [("ann", at(7))])
    assert state.standings({"ann", "bob"})["ann"].place["step"] == 7
    state.name = ""
    found = state.standings({"ann", "bob"})
    assert found.keys() == {"ann", "bob"}
    for standing in found.values():
        assert standing.place["step"] == 5 and standing.tensors["row"].eq(5).all()


def test_training_again_that_was_interrupted_goes_on_replacing(task, base, whole, tmp_path, stop_after):
    other = replace(CONFIG, learning_rate=0.05)
    store = tmp_path / "store"
    assert not torch.equal(*(found["user00000"].row for found in (trained(base, task, store, config=other), whole)))
    with pytest.raises(InputError, match="already"):
        trained(base, task, store)
    interrupted_store(base, task, store, stop_after, again=True)
    assert_same(trained(base, task, store, resume=True), whole)  # --again need not be said again
    Store(store).delete("user00003")
    assert trained(base, task, store, resume=True).keys() == whole.keys() - {"user00003"}


def test_killed_at_any_flush_of_its_beginning_it_can_be_gone_on_with(tmp_path, monkeypatch):
    fsync, flushes = os.fsync, 0

    def killed(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise SystemExit
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", killed)
    while True:
        left = flushes
        try:
            State(tmp_path / str(flushes)).begin({"seed": 3}, False)
            break
        except SystemExit:
            left = 99
        state = State(tmp_path / str(flushes))
        if state.begun:
            assert (state.folder / "done.jsonl").exists()
            state.go_on()
            assert state.done() == {}
        else:
            state.begin({}, False)
        assert not list(state.folder.glob("*.tmp"))
        flushes += 1
    assert flushes > 3


def test_the_list_of_who_is_done_is_cut_and_never_written_anew(tmp_path):
    state = State(tmp_path)
    state.begin({}, False)
    state.note([("ann", ""), ("bob", "so")])
    with open(state.folder / "done.jsonl", "ab") as file:
        file.write(b'["torn')
    (state.folder / "rank-0-of-1.11.tmp").touch()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))  # no file takes a byte
    try:
        state.go_on()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    state.note([("zoe", "")])
    assert State(tmp_path).done() == {"ann": "", "bob": "so", "zoe": ""}
    assert {path.name for path in state.folder.iterdir()} == {"run.json", "done.jsonl"}
    (state.folder / "done.jsonl").unlink()
    state.go_on()
    assert state.done() == {}


def test_a_flipped_bit_in_the_shared_adapter_is_found(tmp_path):
    state, path = State(tmp_path), tmp_path / "training" / "shared.safetensors"
    state.keep_shared(Adapter("(everyone)", LoRA(rank=3), torch.randn(64), {"val_loss": [1.5]}))
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        for some in (damaged, content[:position]):
            path.write_bytes(some)
            with pytest.raises(InputError, match=r"shared\.safetensors is damaged .*delete it and --resume"):
                state.shared()


def test_one_training_of_a_store_at_a_time(task, base, tmp_path, monkeypatch):
    store, refused = tmp_path / "store", []
    monkeypatch.setattr(resume, "LOCK_S", 0.0)

    def second(adapter):
        with pytest.raises(InputError, match="training is being written by process") as raised:
            trained(base, task, store, resume=True)
        refused.append(raised.value)
        raise Interrupted(signal.SIGTERM)

    stale = Training.plan(base, task, CONFIG, store, passes=EXACT, resume=True)
    with pytest.raises(Interrupted):
        Training.plan(base, task, CONFIG, store, passes=EXACT).run(second)
    assert len(refused) == 1
    with pytest.raises(InputError, match="was trained into meanwhile; start again"):
        stale.run()


def test_a_log_that_cannot_be_written_is_one_line(task, base, tmp_path):
    for name, message in (("full", "the disk is full"), ("folder", "log.jsonl cannot be written .Is a directory")):
        plan = Training.plan(base, task, CONFIG, tmp_path / name, passes=EXACT)
        log = tmp_path / name / "log.jsonl"
        if name == "full":
            log.symlink_to("/dev/full")
        else:
            log.mkdir()
        with pytest.raises(InputError, match=message):
            plan.run()
        assert not Store(tmp_path / name).users(), "it is found out at once"


def test_json_has_no_numbers_that_json_has_not(base, tmp_path, capsys):
    def strict(line):
        return json.loads(line, parse_constant=lambda constant: pytest.fail(constant))

    with Log(tmp_path / "log.jsonl") as log:
        log.event("finished", user="\ud800", val_loss=[1.5, float("inf")], more={"loss": float("nan")})
    line = strict((tmp_path / "log.jsonl").read_text())
    assert (line["user"], line["val_loss"], line["more"]) == ("\ud800", [1.5, None], {"loss": None})
    metrics = {"val_loss": [float("inf")], "best_epoch": 1, "epochs": 1, "steps": 1, "stopped_early": False,
               "skipped_steps": 0}  # fmt: skip
    method = LoRA(rank=2)
    Store.make(tmp_path / "store", base).add(Adapter("ann", method, method.initial_row(base, 0, "ann"), metrics), base)
    assert main(["users", "--store", str(tmp_path / "store"), "--json"]) == 0
    strict(capsys.readouterr().out.splitlines()[-1])


def test_deterministic_mode_on_a_gpu_is_refused_before_there_is_a_store(task, base, tmp_path, monkeypatch):
    monkeypatch.setattr(type(base), "device", property(lambda self: torch.device("cuda")))
    with pytest.raises(InputError, match="deterministic mode is not built for a GPU"):
        Training.plan(base, load_task(task), CONFIG, tmp_path / "store", passes=EXACT)
    assert not (tmp_path / "store").exists()


def test_more_epochs_than_a_store_can_tell_of_are_refused(task, base, tmp_path):
    with pytest.raises(InputError, match=f"epochs must be at most {MOST_EPOCHS}"):
        trained(base, task, tmp_path / "store", config=replace(CONFIG, epochs=MOST_EPOCHS + 1))
    assert not (tmp_path / "store").exists()
    method, big = LoRA(rank=2), 2**62
    metrics = {"best_epoch": big, "epochs": big, "steps": big, "val_loss": [1.5] * MOST_EPOCHS,
               "stopped_early": False, "skipped_steps": big}  # fmt: skip
    adapter = Adapter("ann", method, method.initial_row(base, 0, "ann"), metrics)
    Store.make(tmp_path / "store", base).add(adapter, base)


# ---- Faults --------------------------------------------------------------------------------------------------------


def edited(task, folder, edit, splits=("train",)):
    """A copy of the task whose lines of user00003 in these splits went through `edit`."""
    shutil.copytree(task, folder)
    for path in (folder / f"{split}.jsonl" for split in splits):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [edit(line) if line["user"] == "user00003" else line for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


BROKEN = {
    "an empty text": (lambda line: line | {"text": " "}, '"text" is empty'),
    "a label outside the set": (lambda line: line | {"label": ["perhaps"]}, "label 'perhaps' is not in task.json"),
    "no label": (lambda line: {name: value for name, value in line.items() if name != "label"}, 'no field "label"'),
    "one id twice": (lambda line: line | {"id": "same"}, "already has id 'same'"),
}  # fmt: skip


@pytest.mark.parametrize("edit, reason", BROKEN.values(), ids=BROKEN)
def test_a_user_with_broken_examples_is_left_out_and_nobody_else_notices(task, base, whole, tmp_path, edit, reason):
    store, faults, seen = tmp_path / "store", [], []
    poisoned = edited(task, tmp_path / "task", edit)
    plan = Training.plan(base, poisoned, CONFIG, store, passes=EXACT)
    summary = plan.run(on_fault=faults.append, show=lambda title: nullcontext(lambda *shares: seen.append(shares)))
    assert seen[-1][0] == seen[-1][1], "what they had is worked off"
    assert [fault.user for fault in faults] == ["user00003"] == list(summary.quarantined)
    assert reason in faults[0].reason and "\n" not in faults[0].reason and "train.jsonl:" in faults[0].reason
    assert_same(adapters(store, base), {user: whole[user] for user in whole if user != "user00003"})
    assert [line["reason"] for line in log_of(store, "quarantined")] == [faults[0].reason]
    again = Training.plan(base, poisoned, CONFIG, store, passes=EXACT, resume=True).run()
    assert again.quarantined == summary.quarantined and again.trained == 0
    assert len(log_of(store, "quarantined")) == 1, "nobody tries them again"
    with pytest.raises(InputError) as raised:  # from Python an error, unless somebody asks to be told
        minipeft.train(base, poisoned, LoRA(rank=2), store=tmp_path / "other")
    assert str(raised.value) == faults[0].reason and not (tmp_path / "other").exists()


def test_who_diverges_is_left_out_and_strictly_an_error_in_the_end(task, base, tmp_path, monkeypatch):
    """A start from which nothing comes, of one user."""
    job = Training.job

    def poisoned(training, user):
        own, num_cut = job(training, user)
        size = own.config.method.layout(base).row_size
        return (replace(own, start=torch.full((size,), torch.nan)) if user == "user00003" else own), num_cut

    monkeypatch.setattr(Training, "job", poisoned)
    summary = Training.plan(base, task, CONFIG, tmp_path / "store", passes=EXACT).run()
    assert list(summary.quarantined) == ["user00003"] and summary.trained == NUM_USERS - 1
    assert "diverged: not one step of epoch 1" in summary.quarantined["user00003"]
    with pytest.raises(InputError, match=r"1 of 8 users could not be trained, e\.g\. 'user00003': user 'us"):
        trained(base, task, tmp_path / "strict", strict=True)
    assert len(adapters(tmp_path / "strict", base)) == NUM_USERS - 1


def test_nobody_trained_is_an_error(task, base, tmp_path):
    with pytest.raises(InputError, match=r"8 of 8 users could not be trained, e\.g\. 'user000.*diverged"):
        trained(base, task, tmp_path / "store", config=replace(CONFIG, learning_rate=1e30))


# ---- Several processes ---------------------------------------------------------------------------------------------


def command(task, model, store, *more, ranks=1):
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch = [*launch, "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m"]
    argv = [*launch, "minipeft", "train", "--model", model, "--task", task, "--store", store, "--method", "lora",
            "--rank", 2, "--dropout", 0.25, "--sites", "v", "--learning-rate", 0.02, "--epochs", 3, "--batch-size", 4,
            "--patience", 1, "--slots", 3, "--token-budget", 300, "--deterministic", *more]  # fmt: skip
    return list(map(str, argv))


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_processes_gives_the_same_bits(task, model, base, whole, tmp_path, ranks):
    poisoned = edited(task, tmp_path / "task", BROKEN["no label"][0])
    done = subprocess.run(command(poisoned, model, tmp_path / "store", "--json", ranks=ranks), capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(adapters(tmp_path / "store", base), {user: whole[user] for user in whole if user != "user00003"})
    assert log_of(tmp_path / "store", "start")[0]["ranks"] == ranks


def test_a_rank_that_is_killed_comes_back_and_nobody_is_lost(task, model, base, whole, tmp_path):
    """torchrun ends the others by SIGTERM, which they save at, and starts all of them again."""
    argv, store = command(task, model, tmp_path / "store", "--resume", ranks=2), tmp_path / "store"
    argv[argv.index("--standalone")] = "--standalone --max-restarts=2"
    process = subprocess.Popen(" ".join(argv), shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not ((store / "log.jsonl").exists() and log_of(store, "start")):
        time.sleep(0.01)
    os.kill(rank_of(store, 1), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert len(log_of(store, "start")) == 2 and len(log_of(store, "end")) == 1
    assert log_of(store, "saved"), "process 0 saved when the other one was gone"
    finished = [line["user"] for line in log_of(store, "finished")]
    assert sorted(finished) == sorted(whole), "nobody is trained twice"
    assert_same(adapters(store, base), whole)


class OneOfTwo(Ranks):
    """A process that hears from the other one what that would tell, and then no more."""

    all_ended = True

    def __init__(self, rank, other_says):
        super().__init__(rank, 2)
        self._other_says = other_says

    def tell(self, content=b"", teller=0):
        return content if teller == self.rank else self._other_says

    def listen(self):
        pass


def test_processes_that_were_given_different_things_are_refused(task, base, tmp_path):
    """By each of them, before anything of an earlier training is forgotten."""
    other_base = load_model(make_decoder(load_task(task), tmp_path / "other", seed=1))
    other_task = edited(task, tmp_path / "task", lambda line: line | {"text": "so"})
    right = (base, task, CONFIG)
    cases = {"the base": (other_base, task, CONFIG), "the task's examples": (base, other_task, CONFIG),
             "seed": (base, task, replace(CONFIG, seed=5))}  # fmt: skip
    for what, given in cases.items():
        for rank, (own, other) in ((0, (right, given)), (1, (given, right))):
            store = tmp_path / f"store {what} {rank}"
            says = json.dumps(Training.plan(*other, tmp_path / f"{store} 2", passes=EXACT).described()).encode()
            plan = Training.plan(*own, store, passes=EXACT, ranks=OneOfTwo(rank, says))
            with pytest.raises(InputError, match=f"{what} is .* at process 0, .* at process 1"):
                plan.run()
            assert not (store / "training" / "run.json").exists()


def test_what_came_before_a_connection_broke_is_kept(base, tmp_path, monkeypatch):
    method = LoRA(rank=2)
    metrics = {"stopped_early": False, "skipped_steps": 0}
    sent = packed(Adapter("ann", method, method.initial_row(base, 0, "ann"), metrics))
    pieces = [torch.tensor([len(sent)]), torch.frombuffer(bytearray(sent), dtype=torch.uint8)]

    def recv(tensor, sender=None):
        if not pieces:
            raise RuntimeError("connection closed by peer")
        tensor.copy_(pieces.pop(0))
        return 1

    monkeypatch.setattr(ranks_module.dist, "recv", recv)
    ranks, state = Ranks(0, 2), State(tmp_path / "store")
    ranks._receive()
    store = Store.make(tmp_path / "store", base)
    state.begin({}, False)
    with pytest.raises(RuntimeError, match="went away"):
        Desk(store, base, state, ranks, Stop()).take_arrived()
    assert store.users() == ["ann"] and state.done() == {"ann": ""}


def rank_of(store, rank):
    """The process id of this rank of the training into this store."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
        if str(store).encode() in command and f"RANK={rank}".encode() in environment:
            return int(process.name)
    raise AssertionError("that rank does not run")


def test_shares_are_balanced_and_a_function_of_the_users_alone():
    users, sizes = [f"user {i}" for i in range(40)], [1000 // (i + 1) for i in range(40)]
    for number in (1, 2, 3, 5):
        shares = share_out(users, sizes, number)
        assert sorted(user for share in shares for user in share) == sorted(users) and len(shares) == number
        assert shares == share_out(users, sizes, number)
        loads = [sum(sizes[users.index(user)] for user in share) for share in shares]
        best = max(sum(sizes) / number, sizes[0])
        assert max(loads) <= 4 / 3 * best
        assert all([users.index(user) for user in share] == sorted(users.index(user) for user in share)
                   for share in shares)  # fmt: skip


def test_news_go_through_bytes():
    adapter = Adapter("ann", LoRA(rank=3), torch.randn(64), {"val_loss": [1.5, float("inf")]})
    back = unpacked(packed(adapter))
    assert torch.equal(back.row, adapter.row) and replace(back, row=adapter.row) == adapter
    for news in (Fault("b\0b", "so"), {"num_cut": 3, "splits": 0}):
        assert unpacked(packed(news)) == news


# ---- A task user by user -------------------------------------------------------------------------------------------


def test_a_task_on_disk_is_the_task_in_memory(task):
    lazy, eager = TaskFolder(task), load_task(task)
    assert (lazy.header, lazy.users) == (eager.header, eager.users)
    for user in reversed(lazy.users):
        assert lazy.examples(user) == eager.examples(user) == (eager.train[user], eager.val[user])
        assert lazy.num_train(user) == eager.num_train(user) == len(eager.train[user])
        assert 0 < eager.size(user) < lazy.size(user)
    first = TaskFolder(task, 3)
    assert first.users == eager.users[:3] and first.digest != lazy.digest == TaskFolder(task).digest
    assert eager.digest == load_task(task).digest != eager.subset(eager.users[1:]).digest
    with pytest.raises(InputError, match="has 8 users"):
        TaskFolder(task, 9)


@pytest.mark.parametrize("line, message", [
    ("so", "train.jsonl:3: not JSON"), ("[]", "train.jsonl:3: came a list"), ('{"text": "a"}', 'no field "user"'),
    ('{"user": " "}', '"user" is empty'), ('{"user": 3}', '"user" is of type int'),
])  # fmt: skip
def test_a_line_of_nobody_is_everybodys_affair(task, tmp_path, line, message):
    folder = shutil.copytree(task, tmp_path / "task")
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(InputError, match=message):
        TaskFolder(folder)


def test_a_task_without_files_is_refused(task, tmp_path):
    with pytest.raises(InputError, match="no folder"):
        TaskFolder(tmp_path / "nowhere")
    folder = shutil.copytree(task, tmp_path / "task")
    (folder / "val.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot read .*val.jsonl"):
        TaskFolder(folder)
    (folder / "val.jsonl").write_text("")
    (folder / "train.jsonl").write_text("")
    with pytest.raises(InputError, match=r"train\.jsonl is empty"):
        TaskFolder(folder)


# ---- The command ---------------------------------------------------------------------------------------------------


def test_the_command_counts_who_was_trained_left_out_and_done_before(task, model, tmp_path, capsys, stop_after):
    poisoned, store = edited(task, tmp_path / "task", BROKEN["no label"][0]), tmp_path / "store"
    argv = command(poisoned, model, store, "--json")[3:]
    stop_after(36, signal.SIGTERM)
    assert main(argv) == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert error.endswith("Go on with --resume.\n") and "Traceback" not in error
    stop_after(0)
    assert main(argv) == 2 and "--resume" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["skipped"] > 0 and result["num_users"] + result["skipped"] == NUM_USERS - 1
    assert [each["user"] for each in result["quarantined"]] == ["user00003"]
    assert any(line.startswith("left out: 'user00003': ") for line in lines)
    assert lines[-1].startswith(f"trained {result['num_users']} users (") and "left out 1, " in lines[-1]
    assert log_of(store, "saved") and log_of(store, "end")[0]["trained"] == result["num_users"]
    assert {"num_users", "stopped_early", "skipped_steps", "num_cut_texts"} <= result.keys()


def test_tensorboard_is_an_extra(task, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(command(task, model, tmp_path / "store", "--tensorboard", tmp_path / "board")[3:]) == 2
    assert capsys.readouterr().err.endswith("pip install 'minipeft[tensorboard]'\n")
    assert not (tmp_path / "store").exists()


def test_numbers_of_the_log_go_to_tensorboard(task, base, tmp_path, monkeypatch):
    monkeypatch.setattr(training_module, "MINUTE", 0.0)
    seen = []
    plan = Training.plan(base, task, CONFIG, tmp_path / "store", passes=EXACT)
    plan.run(scalar=lambda name, number, now: seen.append((name, number)))
    assert {"finished/best_epoch", "passes/rows"} <= {name for name, _ in seen} and ("end/trained", NUM_USERS) in seen
    statistics = log_of(tmp_path / "store", "passes")
    assert [line["passes"] for line in statistics] == list(range(1, len(statistics) + 1))
    assert statistics[-1]["worked_off"] == statistics[-1]["planned"]


def test_memory_holds_the_jobs_of_residents_alone(task, base, tmp_path, monkeypatch):
    """A user's examples are read when they get a slot, not before."""
    read, behind = [], []
    job = Training.job
    monkeypatch.setattr(Training, "job", lambda training, user: read.append(user) or job(training, user))
    plan = Training.plan(base, task, CONFIG, tmp_path / "store", passes=EXACT)
    plan.run(lambda adapter: behind.append(len(read)))
    assert behind[0] == EXACT.slots and behind[-1] == NUM_USERS and len(read) == NUM_USERS


def test_slots_auto_gives_the_same_bits(task, base, whole, tmp_path):
    plan = Training.plan(base, task, CONFIG, tmp_path / "store", passes=replace(EXACT, slots="auto"))
    assert plan.passes.slots >= NUM_USERS and plan.passes.token_budget > EXACT.token_budget
    plan.run()
    assert_same(adapters(tmp_path / "store", base), whole)
