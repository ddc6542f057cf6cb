"""Does a base in parts on several processes train everybody as a whole one does, and stop and fail as it should?"""

import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist
from test_training import (  # noqa: F401  # fixtures
    CONFIG,
    adapters,
    assert_same,
    base,
    command,
    log_of,
    model,
    task,
    whole,
)

from minipeft import sharding
from minipeft.__main__ import main
from minipeft.errors import InputError
from minipeft.methods.dora import DoRA
from minipeft.ranks import Ranks
from minipeft.schedule import PassConfig
from minipeft.sharding import IDLE, SCORE, STOP, TRAIN, Lockstep, Stopped, check_sharded, shard


@pytest.mark.parametrize("more", [(), ("--recompute",), ("--on-shared",)])
def test_a_base_in_parts_gives_the_same_bits(task, model, base, whole, tmp_path, more):  # noqa: F811
    expected = whole
    if more == ("--on-shared",):
        assert main(command(task, model, tmp_path / "alone", *more)[3:]) == 0
        expected = adapters(tmp_path / "alone", base)
    done = subprocess.run(command(task, model, tmp_path / "store", "--shard-base", *more, ranks=2),
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(adapters(tmp_path / "store", base), expected)


def test_each_rank_keeps_a_part_of_each_matrix(model, tmp_path):  # noqa: F811
    program = tmp_path / "program.py"
    program.write_text(f"""
from minipeft.models.loading import load_model
from minipeft.ranks import joined
from minipeft.sharding import shard
with joined() as ranks:
    base = load_model({str(model)!r})
    before = sum(p.numel() for layer in base.layers for p in layer.parameters() if p.ndim == 2)
    shard(base, "cpu", ranks)
    kept = sum(p.to_local().numel() for layer in base.layers for p in layer.parameters() if p.ndim == 2)
    assert 2 * kept == before, (kept, before)
    assert type(base.embed.weight).__name__ == "Parameter"
""")
    launch = command("", "", "", ranks=2)
    done = subprocess.run([*launch[: launch.index("-m", 3)], str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_all_ranks_stop_before_the_same_pass_and_go_on(task, model, base, whole, tmp_path):  # noqa: F811
    store = tmp_path / "store"
    argv = command(task, model, store, "--shard-base", "--resume", ranks=2)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not ((store / "log.jsonl").exists() and log_of(store, "finished")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(adapters(store, base), whole)


# ---- The agreement -------------------------------------------------------------------------------------------------


def lockstep(monkeypatch, others):
    """One rank's side. others: what the other ranks want, round by round: [IDLE, SCORE, TRAIN, STOP] votes."""
    made, rounds = object.__new__(Lockstep), iter(others)
    made.stopping, made._group, made._last, made.passes = lambda: False, None, IDLE, []
    monkeypatch.setattr(made, "_empty", made.passes.append, raising=False)
    monkeypatch.setattr(dist, "all_reduce", lambda votes, group: votes.add_(torch.tensor(next(rounds))))
    return made


def votes(**wanted):
    return [wanted.get(name, 0) for name in ("idle", "score", "train", "stop")]


def test_who_wants_what_few_want_runs_empty_passes_until_then(monkeypatch):
    mine = lockstep(monkeypatch, [votes(train=2), votes(train=2), votes(train=1), votes(score=1, idle=1)])
    mine.before(training=False)
    assert mine.passes == [TRAIN, TRAIN], "of two that as many want, what did not come last"
    mine.before(training=False)


def test_who_has_nobody_left_keeps_the_others_company(monkeypatch):
    mine = lockstep(monkeypatch, [votes(train=1), votes(score=1), votes(idle=1)])
    mine.finish()
    assert mine.passes == [TRAIN, SCORE]


def test_one_who_stops_stops_all(monkeypatch):
    mine = lockstep(monkeypatch, [votes(train=1, stop=1)])
    with pytest.raises(Stopped):
        mine.before(training=True)
    mine = lockstep(monkeypatch, [votes(train=2)])
    mine.stopping = lambda: True
    with pytest.raises(Stopped):
        mine.finish()
    assert STOP == sharding.STOP


# ---- What cannot be ------------------------------------------------------------------------------------------------


def test_one_process_has_nobody_to_share_with(task, model, tmp_path, capsys):  # noqa: F811
    assert main(command(task, model, tmp_path / "store", "--shard-base")[3:]) == 2
    assert "start them with torchrun" in capsys.readouterr().err


def test_methods_and_bases_that_need_whole_matrices_are_refused():
    with pytest.raises(InputError, match="take lora"):
        check_sharded(DoRA(), PassConfig())
    with pytest.raises(InputError, match="give --slots N"):
        check_sharded(CONFIG.method, PassConfig(slots="auto"))
    with pytest.raises(InputError, match="takes decoders, not a Tensor"):
        shard(torch.zeros(1), "cpu", Ranks(0, 2))
