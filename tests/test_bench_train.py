"""Does `bench train` compare what it says, notice a contender that trains something else, and meet bad input?"""

import json
from dataclasses import replace

import pytest
import torch
from small_bases import MAKERS

from minipeft import bench, bench_train, default_base, peers
from minipeft.bench_train import main_work, parse
from minipeft.contenders import SAME_LOSS, Apart, compared
from minipeft.errors import InputError
from minipeft.methods.ia3 import IA3
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import save_task

MEMORY_OF = bench_train.memory_of


@pytest.fixture(autouse=True)
def small_and_quick(tmp_path, monkeypatch):
    for peer in ("transformers", "peft"):
        pytest.importorskip(peer)
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_base, "STEPS", 2)
    small = dict(width=32, num_layers=2, num_heads=2, num_kv_heads=2, mlp_width=64, head_dim=16, max_positions=64)
    for where in (default_base, bench_train):
        monkeypatch.setattr(where, "SHAPE", default_base.SHAPE | small)
    monkeypatch.setattr(bench_train, "STEPS", 3)
    monkeypatch.setattr(bench_train, "TURNS", 2)
    monkeypatch.setattr(bench_train, "memory_of", lambda contender, argv: {"peak_mb": 2.0, "grown_mb": 1.0})
    monkeypatch.setattr(bench_train, "CURVE_TOKENS", {False: (16, 128)})
    monkeypatch.setattr(bench_train, "CURVE_USERS", {False: (1, 3)})
    monkeypatch.setattr(bench_train, "CURVE_AT", (3, 16))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A task, and an encoder for it."""
    task, _ = make_synthetic(SyntheticConfig(users=4, max_examples=24, test_examples=5, texts=60))
    folder = tmp_path_factory.mktemp("task")
    save_task(task, folder)
    return folder, MAKERS["bert"](task, tmp_path_factory.mktemp("bert"))


def test_the_default_run_measures_every_contender_and_the_curves(tmp_path, capsys):
    assert bench.main(["train", "--users", "3", "--out", str(tmp_path / "out"), "--profile"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    first, *curve = result["runs"]
    assert {"base", "device", "users", "tokens_per_user_step", "method", "fused_users_per_s", "one_by_one_users_per_s",
            "peft_users_per_s", "published_users_per_s", "fused_peak_mb", "peft_peak_mb", "max_relative_difference",
            "frozen_trunk"} <= set(first)  # fmt: skip
    assert first["base"] == "default" and first["users"] == 3 and first["resident_mb"] > 0
    assert all(first[f"{name}_users_per_s"] > 0 for name in bench_train.CONTENDERS)
    assert len(first["fused_seconds"]) == 2 and first["max_loss_difference"] <= SAME_LOSS
    assert [(run["users"], run["tokens_per_user_step"]) for run in curve] == [(3, 16), (3, 128), (1, 16)]
    assert {run["published_users_per_s"] for run in curve} == {None}
    assert (tmp_path / "out" / "train.png").stat().st_size and (tmp_path / "out" / "kernels.txt").stat().st_size


def test_an_encoder_with_kept_states_trains_what_peft_trains(folders, tmp_path, capsys):
    task, model = folders
    argv = ["train", "--task", str(task), "--model", str(model), "--top-layers", "1", "--no-curves"]
    assert bench.main([*argv, "--out", str(tmp_path)]) == 0
    (run,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert run["frozen_trunk"] and run["trunk_seconds"] > 0 and run["users"] == 4
    work = main_work(parse(argv[1:]))
    assert {site.split(".")[1] for site in work.base.sites} == {str(len(work.base.encoder.layers) - 1)}
    ours, theirs = work.one_by_one(), work.peft()
    for user, row in ours.items():
        torch.testing.assert_close(theirs[user], row, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("who", ["fused", "peft", "published"])
def test_a_contender_that_trains_something_else_is_noticed(folders, who, monkeypatch):
    task, model = folders
    work = main_work(parse(["--task", str(task), "--model", str(model)]))
    made = getattr(work, who)()
    monkeypatch.setattr(work, who, lambda: {user: 1.5 * row for user, row in made.items()})
    with pytest.raises(Apart):
        compared(work, ["fused", "one_by_one", "peft", "published"])


def test_padding_to_512_changes_no_gradient(folders):
    task, model = folders
    work = main_work(parse(["--task", str(task), "--model", str(model)]))
    tuned, published = work.peft(1), work.published()
    for user, row in tuned.items():
        torch.testing.assert_close(published[user], row, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("who", ["fused", "peft"])
def test_a_process_of_its_own_says_what_memory_a_contender_takes(folders, who):
    task, model = folders
    found = MEMORY_OF(who, ["--task", str(task), "--model", str(model)])
    assert 0 < found["grown_mb"] < 200 < found["peak_mb"] < 3000


def test_without_peers_ours_is_measured_and_it_is_said(tmp_path, monkeypatch, capsys):
    def absent(*args):
        raise InputError("peft is not installed: pip install 'minipeft[test]'")

    monkeypatch.setattr(bench_train, "Peft", absent)
    assert bench.main(["train", "--users", "2", "--no-curves", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "without peers: peft is not installed" in out
    assert json.loads(out.splitlines()[-1])["runs"][0]["peft_users_per_s"] is None


@pytest.mark.parametrize("method", [IA3(), replace(bench_train.METHOD, dropout=0.5)])
def test_peers_refuse_what_they_cannot_train(folders, method):
    task, model = folders
    work = main_work(parse(["--task", str(task), "--model", str(model)]))
    with pytest.raises(InputError, match="peers train"):
        peers.Peft(work.base, work.labels, method)


@pytest.mark.parametrize("argv, message", [
    (["--users", "0"], "--users must be at least 1, got 0"),
    (["--token-budget", "0"], "token_budget must be at least 1, got 0"),
    (["--users", "3", "--sites", "nowhere"], "nowhere"),
    (["--users", "3", "--top-layers", "9"], "this base has 2 layers"),
    (["--device", "warp"], "--device warp"),
])  # fmt: skip
def test_bad_input_is_one_line(argv, message, tmp_path, capsys):
    assert bench.main(["train", *argv, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
