"""Are slots and rows of a pass what the free memory holds?"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_engine import LABELS, make_job, make_model

from minipeft import memory
from minipeft.engine import Engine
from minipeft.errors import InputError
from minipeft.memory import MOST_ROWS, fitted, free_memory
from minipeft.schedule import PassConfig

AUTO = PassConfig(slots="auto")


@pytest.fixture(scope="module")
def jobs():
    return [replace(make_job(i), config=make_job(0).config) for i in range(4)]


def test_free_memory_is_what_the_system_says(monkeypatch):
    told = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()}
    assert 2**20 < free_memory(torch.device("cpu")) <= told["MemTotal"]
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal: 3 kB\n")
    with pytest.raises(InputError, match="does not say how much memory is free; give a number"):
        free_memory(torch.device("cpu"))


def test_a_container_s_limit_counts_what_is_in_use_and_is_shared(monkeypatch, tmp_path):
    """Pages of files that nobody used lately are given back when they are needed."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    for name, text in (("max", "9000\n"), ("current", "8500\n"), ("stat", "anon 500\ninactive_file 7500\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory(torch.device("cpu")) == 8000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(torch.device("cpu")) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 2**20


def test_more_memory_more_rows_and_slots_up_to_what_is_of_use(jobs, monkeypatch):
    model, found = make_model(), []
    for mib in (3, 6, 12, 10**6):
        monkeypatch.setattr(memory, "free_memory", lambda device: mib << 20)  # noqa: B023
        found.append(fitted(AUTO, model, LABELS, jobs))
    rows, slots = ([getattr(passes, name) for passes in found] for name in ("token_budget", "slots"))
    assert 1 <= rows[0] < rows[1] < rows[2] <= rows[3] == MOST_ROWS["cpu"]
    assert 1 <= slots[0] < slots[1] < slots[2] <= slots[3]
    assert rows[1] == pytest.approx(2 * rows[0], abs=2) and slots[1] == pytest.approx(2 * slots[0], abs=2)
    per_user = sum(run.minibatch(LABELS).num_rows for run in map(Engine(model, LABELS).begin, jobs)) / len(jobs)
    assert slots[3] == pytest.approx(2 * rows[3] / per_user, abs=1)
    assert all(passes.deterministic == AUTO.deterministic for passes in found)
    monkeypatch.setattr(memory, "free_memory", lambda device: 3 << 10)
    with pytest.raises(InputError, match="0 MiB of memory are free on cpu: not enough for one user"):
        fitted(AUTO, model, LABELS, jobs)


def test_frozen_weights_do_not_count_and_longer_rows_do(jobs):
    model = make_model()
    kept, num_rows = memory._kept_bytes(PassConfig(), model, LABELS, jobs)
    whole = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    doubled = [replace(job, config=replace(job.config, batch_size=2 * job.config.batch_size)) for job in jobs]
    more, more_rows = memory._kept_bytes(PassConfig(), model, LABELS, doubled)
    assert kept > 4 * num_rows * model.config.width * 10 and whole > 0  # dozens of activations a row
    assert more / kept == pytest.approx(more_rows / num_rows, rel=0.2)


def test_an_engine_wants_a_number():
    with pytest.raises(InputError, match="slots must be at least 1, got auto"):
        Engine(make_model(), LABELS, AUTO)


def test_a_probe_that_memory_does_not_hold_takes_fewer_users(jobs, monkeypatch):
    model, step, tried = make_model(), Engine.train_step, []

    def most(number):
        def short(engine, chosen):
            tried.append(len(chosen))
            if len(chosen) > number:
                raise RuntimeError("Triton Error [CUDA]: out of memory")
            step(engine, chosen)

        monkeypatch.setattr(Engine, "train_step", short)

    most(1)
    passes = fitted(AUTO, model, LABELS, jobs)
    assert tried == [4, 2, 1] and passes.slots > 1
    most(0)
    with pytest.raises(InputError, match="memory on cpu does not hold one user's minibatch"):
        fitted(AUTO, model, LABELS, jobs)
