"""However a training ends (a process gone, no room, SIGTERM, an error): is all saved, and in little memory?"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_training import (  # noqa: F401  # fixtures
    CONFIG,
    EXACT,
    NUM_USERS,
    OneOfTwo,
    adapters,
    assert_same,
    base,
    command,
    log_of,
    model,
    stop_after,
    task,
    trained,
    whole,
)

from minipeft import desk as desk_module
from minipeft import ranks as ranks_module
from minipeft.desk import Desk
from minipeft.engine import Engine
from minipeft.errors import InputError, SaidElsewhere
from minipeft.files import BLOCK, cut_torn
from minipeft.index import only_writer
from minipeft.log import Log, tensorboard
from minipeft.methods.lora import LoRA
from minipeft.ranks import Gone, Ranks
from minipeft.resume import State, packed, unpacked
from minipeft.running import predict
from minipeft.schedule import PLACE, Adapter, PassConfig, Standing
from minipeft.sharding import Stopped
from minipeft.stopping import Stop
from minipeft.store import Store
from minipeft.training import Interrupted, Training

METRICS = {"stopped_early": False, "skipped_steps": 0}


class Deserted(Ranks):
    """Process 1 of 2. taken: what process 0 took before it went away; None: it is gone."""

    def __init__(self, taken=None):
        super().__init__(1, 2)
        self.taken, self.has_left = taken, False

    def tell(self, content=b"", teller=0):
        return content or b"\1" * NUM_USERS

    def send(self, content):
        if self.taken is None:
            raise Gone("process 0")
        self.taken.append(content)

    def leave(self):
        self.has_left = True


def stood(store):
    """Of the training that `Deserted` trains."""
    state = State(store)
    state.name = "\1" * NUM_USERS
    return state.standings({f"user{i:05}" for i in range(NUM_USERS)})


def test_who_could_not_be_handed_over_is_saved_at_the_end_of_their_plan(task, base, whole, tmp_path):  # noqa: F811
    def plan(ranks):
        return Training.plan(base, task, CONFIG, tmp_path / "store", passes=EXACT, ranks=ranks)

    with pytest.raises(Gone):
        plan(Deserted()).run()
    standings = stood(tmp_path / "store")
    assert len(standings) == EXACT.slots
    at_end = [user for user, own in standings.items() if own.place["epoch"] == len(whole[user].metrics["val_loss"])]
    assert at_end
    comes_back = Deserted([])
    plan(comes_back).run()
    *news, counts, end = comes_back.taken
    came = {adapter.user: adapter for adapter in map(unpacked, news)}
    assert set(at_end) < came.keys() and end == b"" and set(unpacked(counts)) == {"num_cut", "splits"}
    for user, adapter in came.items():
        assert torch.equal(adapter.row, whole[user].row) and adapter.metrics == whole[user].metrics


def test_who_is_to_stop_sends_nothing_more_but_that(task, base, tmp_path, stop_after):  # noqa: F811
    ranks = Deserted()
    stop_after(8)
    with pytest.raises(Interrupted):
        Training.plan(base, task, CONFIG, tmp_path / "store", passes=EXACT, ranks=ranks).run()
    assert ranks.has_left and len(stood(tmp_path / "store")) >= EXACT.slots


def desk_of(folder, base, ranks, stop):  # noqa: F811
    store, state = Store.make(folder, base), State(folder)
    state.begin({}, False)
    return store, Desk(store, base, state, ranks, stop)


def test_the_others_last_news_are_heard_before_all_stop(base, tmp_path, monkeypatch):  # noqa: F811
    method, ranks = LoRA(rank=2), Ranks(0, 2)
    sent = packed(Adapter("ann", method, method.initial_row(base, 0, "ann"), METRICS))
    pieces = [torch.tensor([len(sent)]), torch.frombuffer(bytearray(sent), dtype=torch.uint8), torch.tensor([-1])]

    def recv(tensor, sender=None):
        time.sleep(0.1)
        tensor.copy_(pieces.pop(0))
        return 1

    monkeypatch.setattr(ranks_module.dist, "recv", recv)
    store, desk = desk_of(tmp_path / "store", base, ranks, Stop())
    ranks.listen()
    desk.leave()
    assert store.users() == ["ann"] and not pieces
    with pytest.raises(Gone, match="process 1 was stopped"):
        desk.take_arrived()


def test_a_training_waits_for_who_else_writes_its_store_and_says_so_once(base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(desk_module, "SAID_S", 0.0)
    method, stop = LoRA(rank=2), Stop()
    store, desk = desk_of(tmp_path / "store", base, Ranks(), stop)
    ann, bob = (Adapter(user, method, method.initial_row(base, 0, user), METRICS) for user in ("ann", "bob"))
    with ExitStack() as held, pytest.warns(UserWarning, match="waiting until that is done") as said:
        held.enter_context(only_writer(store.folder, 0))
        threading.Timer(0.3, held.close).start()
        desk.take([ann])
    assert store.users() == ["ann"] and len(said) == 1
    stop.signum = signal.SIGTERM
    with only_writer(store.folder, 0), pytest.raises(Stopped):
        desk.take([bob])


@pytest.mark.parametrize("error", [ValueError("whatever"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_whatever_ends_it_what_is_under_way_is_saved(task, base, tmp_path, monkeypatch, error):  # noqa: F811
    run = Engine.run

    def failing(engine, jobs):
        for number, done in enumerate(run(engine, jobs)):
            if number == 5:
                raise error
            yield done

    monkeypatch.setattr(Engine, "run", failing)
    with pytest.raises(ValueError, match=r"whatever|out of memory; lower --slots"):
        trained(base, task, tmp_path / "store")
    assert [line["resident"] for line in log_of(tmp_path / "store", "saved")] == [EXACT.slots]


def test_who_was_interrupted_and_has_no_slot_yet_stays_saved(task, base, tmp_path, stop_after):  # noqa: F811
    store = tmp_path / "store"
    for slots in (3, 1):
        stop_after(2)
        with pytest.raises(Interrupted):
            Training.plan(base, task, CONFIG, store, passes=replace(EXACT, slots=slots), resume=True).run()
    assert len(State(store).standings({f"user{i:05}" for i in range(NUM_USERS)})) == 3


def test_saved_moments_are_dropped_once_they_are_resident(task, base, tmp_path, stop_after, monkeypatch):  # noqa: F811
    store, known, alive, run = tmp_path / "store", [], [], Engine.run
    stop_after(4)
    with pytest.raises(Interrupted):
        trained(base, task, store)
    read = State.standings

    def remembered(state, *args):
        found = read(state, *args)
        known.extend(weakref.ref(own.tensors["exp_avg"]) for own in found.values())
        return found

    def counted(engine, jobs):
        for done in run(engine, jobs):
            yield done
            alive.append(sum(one() is not None for one in known))

    monkeypatch.setattr(State, "standings", remembered)
    monkeypatch.setattr(Engine, "run", counted)
    trained(base, task, store, resume=True)
    assert len(known) == EXACT.slots and alive[-1] == 0 and max(alive) <= 1  # the last one drawn, maybe


def test_saving_takes_one_user_s_numbers_at_a_time(tmp_path):
    alive = []

    def standings():
        for i in range(4):
            row = torch.zeros(64)
            alive.append(weakref.ref(row))
            assert sum(one() is not None for one in alive) <= 2
            place = dict.fromkeys(PLACE, 0) | {"history": []}
            yield f"user {i}", Standing(place, {"row": row, "exp_avg": row + 1, "exp_avg_sq": row + 2})

    state = State(tmp_path)
    state.save("rank-0-of-1", 4, standings())
    assert len(state.standings({f"user {i}" for i in range(4)})) == 4


# ---- Files ---------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_of_the_log_is_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    for before in (b"", b'{"event": 1}\n', b'{"event": 1}\n' * BLOCK):
        path.write_bytes(before + b'{"event": "torn"' + b" " * BLOCK)
        with Log(path) as log:
            log.event("start")
        content = path.read_bytes()
        assert content.startswith(before) and json.loads(content[len(before) :])["event"] == "start"
    cut_torn(path)
    assert path.read_bytes() == content


def test_what_nobody_writes_there_is_damage_of_one_line(tmp_path):
    state = State(tmp_path)
    state.begin({}, False)
    deep = b"[" * 100000 + b"]" * 100000
    for line in (deep, b'["ann"]', b'["ann", 3]', b'[3, ""]', b"{}"):
        (state.folder / "done.jsonl").write_bytes(line + b"\n")
        with pytest.raises(InputError, match=r"done\.jsonl is damaged"):
            state.done()
    right = dict.fromkeys(PLACE, 0) | {"history": [0.5]}
    for wrong in ({"step": 1.5}, {"epoch": True}, {"history": 3}, {"history": ["x"]}, {"more": 3}):
        state.save("rank-0-of-1", 1, [("ann", Standing(right | wrong, {"row": torch.zeros(64)}))])
        with pytest.raises(InputError, match="is damaged"):
            state.standings({"ann"})
    (state.folder / "run.json").write_bytes(deep)
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        State(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "training").touch()
    with pytest.raises(InputError, match="training is no folder; move it away"):
        State(tmp_path / "other")


def test_tensorboard_wants_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=os.makedirs))
    with pytest.raises(InputError, match="file cannot be written"):
        tensorboard(tmp_path / "file")


# ---- What only process 0 sees --------------------------------------------------------------------------------------


def test_what_process_0_refuses_ends_the_others_without_a_word(task, base, tmp_path):  # noqa: F811
    with pytest.raises(SaidElsewhere):
        Training.plan(base, task, CONFIG, tmp_path / "other", passes=EXACT, ranks=OneOfTwo(1, b"")).run()
    trained(base, task, tmp_path / "store")
    told, ranks = [], OneOfTwo(0, b"")
    ranks.tell = lambda content=b"", teller=0: told.append(content)
    with pytest.raises(InputError, match="train them --again"):
        Training.plan(base, task, CONFIG, tmp_path / "store", passes=EXACT, ranks=ranks)
    assert told == [b""]


def test_under_torchrun_it_is_one_line_of_process_0(task, model, base, tmp_path):  # noqa: F811
    trained(base, task, tmp_path / "store")
    done = subprocess.run(command(task, model, tmp_path / "store", ranks=2), capture_output=True, text=True,
                          timeout=200)  # fmt: skip
    assert done.returncode and done.stderr.count("train them --again") == 1
    assert "RuntimeError" not in done.stderr and "Gone" not in done.stderr


def test_at_sigterm_every_process_saves(task, model, base, whole, tmp_path):  # noqa: F811
    store = tmp_path / "store"
    argv = command(task, model, store, "--resume", ranks=2)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not ((store / "log.jsonl").exists() and log_of(store, "finished")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode and "went away" not in output
    assert log_of(store, "saved") and not log_of(store, "end")
    assert {path.name for path in (store / "training").glob("rank-*")} == {f"rank-{r}-of-2.standings" for r in (0, 1)}
    assert Training.plan(base, task, CONFIG, store, passes=EXACT, resume=True).run()
    assert_same(adapters(store, base), whole)


def test_again_wins_over_resume_where_settings_are_others(task, base, tmp_path, stop_after):  # noqa: F811
    store = tmp_path / "store"
    stop_after(2)
    with pytest.raises(Interrupted):
        trained(base, task, store)

    def plan(**settings):
        return Training.plan(base, task, replace(CONFIG, **settings), store, passes=EXACT, resume=True, again=True)

    assert plan().goes_on and not plan(learning_rate=0.01).goes_on


# ---- Memory --------------------------------------------------------------------------------------------------------


def test_answers_take_the_adapters_of_a_few_users_at_a_time(task, base, tmp_path, monkeypatch):  # noqa: F811
    trained(base, task, tmp_path / "store")
    store, sizes, get_many = Store(tmp_path / "store"), [], Store.get_many
    asked = [(user, f"text {i}") for i in range(3) for user in reversed(store.users())]
    expected = predict(base, store, asked, EXACT)
    monkeypatch.setattr(Store, "get_many", lambda own, users, on: sizes.append(len(users)) or get_many(own, users, on))
    found = predict(base, store, asked, replace(EXACT, slots=3))
    assert sizes == [3, 3, 2] and found == expected and [reply.user for reply in found] == [user for user, _ in asked]
    with pytest.raises(InputError, match="no adapter of user 'zoe'"):
        predict(base, store, [*asked, ("zoe", "text")], EXACT)
    assert len(sizes) == 3, "before anything is computed"


def test_slots_that_memory_does_not_hold_end_it_with_one_line(task, base, tmp_path):  # noqa: F811
    passes = PassConfig(slots=10**12)
    with pytest.raises(InputError, match=r"memory does not hold 10+ slots of .* lower --slots"):
        Training.plan(base, task, CONFIG, tmp_path / "store", passes=passes).run()
    assert not State(tmp_path / "store").done(), "nobody was left out for it"
