"""Does a pass in lanes train everybody as one in a single lane does, and do the lanes stay out of each other's way?"""

import threading
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_classifier import C, make_jobs
from test_engine import LABELS, assert_same, make_job, make_model, short_of_memory
from test_trunk import made

from minipeft import engine as engine_file
from minipeft.engine import Engine
from minipeft.errors import InputError
from minipeft.labels import Classes
from minipeft.lanes import Lanes, lanes_on
from minipeft.methods.bottleneck import Houlsby
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.prompt import PromptTuning
from minipeft.models.trunk import Trunk
from minipeft.options import passes_of
from minipeft.profiling import region
from minipeft.schedule import Adapter, PassConfig


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def jobs():
    """LoRA of several ranks and sites, and other methods among them."""
    others = (Houlsby(reduction=4), PromptTuning(tokens=3), IA3())
    some = [make_job(i) for i in range(12)]
    return some[:8] + [replace(job, config=replace(job.config, method=others[i % 3])) for i, job in enumerate(some[8:])]


@pytest.fixture(autouse=True)
def lanes_of_few_rows(monkeypatch):
    monkeypatch.setattr(engine_file, "LEAST_ROWS", 1)


@pytest.fixture
def seen(monkeypatch):
    """(thread, users' rows of each lane) of every lane that ran."""
    lanes, train_lane = [], Engine._train_lane

    def noted(engine, chosen, *more):
        lanes.append((threading.current_thread().name, {run.job.user: run.part.num_rows for run in chosen}))
        train_lane(engine, chosen, *more)

    monkeypatch.setattr(Engine, "_train_lane", noted)
    return lanes


@pytest.mark.parametrize("lanes", [2, 3, 50])
def test_lanes_change_nobody(model, jobs, lanes, seen):
    passes = PassConfig(slots=12, token_budget=900, deterministic=True)
    alone = Engine(model, LABELS, passes).train(jobs)
    assert {name for name, _ in seen} == {"MainThread"}
    seen.clear()
    engine = Engine(model, LABELS, replace(passes, lanes=lanes))
    for user, adapter in engine.train(jobs).items():
        assert_same(adapter, alone[user])
    assert 1 < len({name for name, _ in seen if name != "MainThread"}) <= lanes
    assert engine.totals.passes >= len(seen) and engine.totals.planning > 0


def test_lanes_have_about_as_many_rows_each(model, jobs, seen):
    engine = Engine(model, LABELS, PassConfig(slots=12, token_budget=4096, lanes=2))
    runs = sorted((engine.begin(job) for job in jobs), key=lambda run: (run.bank, run.slot))
    rows = {run.job.user: run.minibatch(LABELS).num_rows for run in runs}
    engine.train_step(runs)
    (_, one), (_, other) = seen
    assert one | other == rows and not one.keys() & other.keys()
    assert abs(sum(one.values()) - sum(other.values())) <= max(rows.values())
    assert [run.step for run in runs] == [1] * len(runs)


def test_a_pass_has_no_more_lanes_than_its_rows_fill(model, jobs, seen, monkeypatch):
    engine = Engine(model, LABELS, PassConfig(slots=12, token_budget=4096, lanes=3))
    runs = sorted((engine.begin(job) for job in jobs), key=lambda run: (run.bank, run.slot))
    rows = sum(run.minibatch(LABELS).num_rows for run in runs)
    for least, lanes in ((rows, 1), (rows // 2, 2), (rows // 9, 3)):
        monkeypatch.setattr(engine_file, "LEAST_ROWS", least)
        seen.clear()
        engine.train_step(runs)
        assert len(seen) == lanes


def test_a_user_alone_and_parameters_derived_for_a_pass_have_one_lane(model, jobs, seen):
    engine = Engine(model, LABELS, PassConfig(slots=4, lanes=2))
    engine.train(jobs[:1])
    by_dora = DoRA(rank=2)
    engine.train([replace(job, config=replace(job.config, method=by_dora)) for job in jobs[:4]])
    shared = Adapter("everyone", by_dora, by_dora.initial_row(model, 0, "everyone"))
    above = Houlsby(reduction=4)
    engine.train([replace(job, config=replace(job.config, method=above), under=shared) for job in jobs[:4]])
    assert {name for name, _ in seen} == {"MainThread"}


def test_under_the_profiler_everything_is_seen(model, jobs, seen):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), region("here"):
        Engine(model, LABELS, PassConfig(slots=4, lanes=2)).train(jobs[:4])
    assert {name for name, _ in seen} == {"MainThread"}


def test_a_lane_that_memory_does_not_hold_goes_in_parts_and_nobody_steps_twice(model, jobs, monkeypatch):
    alone = Engine(model, LABELS, PassConfig(12, deterministic=True)).train(jobs[:6])
    refused = short_of_memory(monkeypatch, 100)
    engine = Engine(model, LABELS, PassConfig(12, deterministic=True, lanes=2))
    for user, adapter in engine.train(jobs[:6]).items():
        assert_same(adapter, alone[user])
    assert refused and engine.totals.splits


def test_what_fails_in_a_lane_is_raised_once_all_have_ended():
    ended = []

    def fails():
        raise ArithmeticError("in a lane")

    def ends():
        threading.Event().wait(0.05)
        ended.append(1)

    with pytest.raises(ArithmeticError, match="in a lane"):
        Lanes(2).run([fails, ends, ends])
    assert ended == [1, 1]


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_cores_are_shared_out_and_the_caller_keeps_all(four_threads):
    threads, later = [], []

    def multiply(found):
        torch.ones(300, 300) @ torch.ones(300, 300)  # a thread's first operation settles how many it takes
        found.append(torch.get_num_threads())

    lanes = Lanes(2)
    for _ in range(2):
        lanes.run([lambda: multiply(threads)] * 3)
        assert set(threads) == {2} and torch.get_num_threads() == 4
    thread = threading.Thread(target=multiply, args=(later,))
    thread.start()
    thread.join()
    assert later == [4], "who begins after the lanes"


def test_as_many_lanes_as_cores_and_as_rows_fill(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 32)
    assert [lanes_on("cpu", rows) for rows in (512, 2048, 4096, 1 << 20)] == [1, 2, 4, 32]
    assert lanes_on("cuda", 1 << 20) == 1
    args = Namespace(device="cpu", token_budget=4096)
    assert passes_of(args) == PassConfig(token_budget=4096, lanes=4)
    assert passes_of(Namespace(device="cpu", lanes=1)) == PassConfig() != passes_of(Namespace(device="cpu"))
    assert passes_of(Namespace(device="cpu", deterministic=True)).lanes == 1


@pytest.mark.parametrize("most_bytes", [1 << 30, 4000], ids=["all kept", "few kept"])
def test_lanes_share_kept_states(most_bytes):
    """Texts for which there is no room are computed for a pass, and gone after the next: not another lane's."""
    jobs = make_jobs(6)
    whole, _ = made(jobs)
    rows = {}
    for lanes in (1, 2):
        base = Trunk(whole, most_bytes=most_bytes)
        adapters = Engine(base, Classes(C), PassConfig(slots=6, lanes=lanes)).train(jobs)
        rows[lanes] = torch.stack([adapters[job.user].row for job in jobs])
    assert np.allclose(rows[1], rows[2], rtol=0, atol=1e-5)


def test_a_gpu_has_no_lanes_and_none_are_not_enough():
    with pytest.raises(InputError, match="lanes must be 1 on a GPU"):
        PassConfig(lanes=2).check(torch.device("cuda"))
    with pytest.raises(InputError, match="lanes must be at least 1"):
        PassConfig(lanes=0).check()
