"""Does `bench train` compare what it says, notice a contender that trains something else, and meet bad input?"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_bases import MAKERS

from minipeft import bench, bench_train, contenders, default_base, engine, peers
from minipeft.bench_train import base_name, main_work, parse
from minipeft.contenders import SAME, SAME_LOSS, SAME_STEPS, Apart, compared
from minipeft.errors import InputError
from minipeft.methods.ia3 import IA3
from minipeft.models.trunk import Trunk
from minipeft.schedule import PassConfig, Run
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import load_task, save_task

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
    monkeypatch.setattr(bench_train, "BASES", {"1M": {}, "8M": dict(mlp_width=96), "25M": dict(mlp_width=128)})


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
            "frozen_trunk", "planning_share"} <= set(first)  # fmt: skip
    assert all(0 < run["planning_share"] < 1 for run in result["runs"])
    assert first["base"] == "default" and first["users"] == 3 and first["resident_mb"] > 0
    assert all(first[f"{name}_users_per_s"] > 0 for name in bench_train.CONTENDERS)
    assert len(first["fused_seconds"]) == 2 and first["max_loss_difference"] <= SAME_LOSS
    assert first["timed"]["peft"] == first["timed"]["published"] == {"users": 3, "steps": 3}
    assert 0 < first["max_step_difference"] <= SAME_STEPS and 0 < first["max_published_step_difference"] <= SAME_STEPS
    assert first["max_sharing_difference"] <= SAME
    assert first["published_reload_seconds"] > 0 and first["num_cut"] == first["num_cut_published"] == 0
    assert first["peak_within_limit"] and first["grown_within_limit"]
    assert [(run["base"][7:], run["users"], run["tokens_per_user_step"]) for run in curve] == [
        ("1M", 3, 16), ("1M", 3, 128), ("1M", 1, 16), ("8M", 3, 16), ("25M", 3, 16)]
    assert result["model"]["random 8M"] is None
    assert set(result["model"]["random 1M"]) == {"pass_s", "user_s", "token_s"}
    assert [run["model_times_one_by_one"] is not None for run in curve] == [True] * 3 + [False] * 2
    assert {run["published_users_per_s"] for run in curve} == {None}
    assert (tmp_path / "out" / "train.png").stat().st_size and (tmp_path / "out" / "kernels.txt").stat().st_size


def test_an_encoder_with_kept_states_trains_what_peft_trains(folders, tmp_path, capsys):
    task, model = folders
    argv = ["train", "--task", str(task), "--model", str(model), "--top-layers", "1", "--no-curves"]
    assert bench.main([*argv, "--out", str(tmp_path)]) == 0
    (run,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert run["frozen_trunk"] and run["trunk_seconds"] > 0 and run["users"] == 4
    assert run["max_trunk_difference"] <= SAME
    with_states, over_plan = (run[f"fused_{what}_users_per_s"] for what in ("with_states", "over_plan"))
    assert with_states < over_plan < run["fused_users_per_s"]
    per_user, planned = 1 / run["fused_users_per_s"], run["planned_steps"]
    assert 4 * (1 / with_states - per_user) == pytest.approx(run["trunk_seconds"])
    assert 4 * (1 / over_plan - per_user) == pytest.approx(run["trunk_seconds"] * run["steps"] / planned)
    work = main_work(parse(argv[1:]))
    assert {site.split(".")[1] for site in work.base.sites} == {str(len(work.base.encoder.layers) - 1)}
    ours, theirs = work.one_by_one(), work.peft()
    for user, row in ours.items():
        torch.testing.assert_close(theirs[user], row, rtol=1e-3, atol=1e-5)


def test_the_model_of_cost_is_that_of_passes_users_and_tokens():
    """Of times that the model itself has made, the constants are found and every gain is met."""
    a, c, b, passes = 5e-3, 1e-3, 2e-5, PassConfig(slots=64, token_budget=2048)

    def run(users, tokens, num_passes):
        alone, together = a + c + b * tokens, a * num_passes + c * users + b * users * tokens
        return {"users": users, "tokens_per_user_step": tokens, "steps": 2, "one_by_one_users_per_s": 1 / (2 * alone),
                "fused_users_per_s": users / (2 * together)}  # fmt: skip

    runs = [run(3, 16, 1), run(3, 1000, 2), run(1, 16, 1), run(300, 16, 5)]
    found = bench_train.model_of_cost(runs, passes)
    assert (found["pass_s"], found["user_s"], found["token_s"]) == pytest.approx((a, c, b))
    for each in runs:
        assert each["model_times_one_by_one"] == pytest.approx(bench_train.faster(each, "one_by_one"))
    assert bench_train.model_of_cost(runs[2:3], passes) is None


def test_lanes_train_what_one_lane_trains(folders, monkeypatch):
    monkeypatch.setattr(engine, "LEAST_ROWS", 1)
    task, model = folders
    argv = ["--task", str(task), "--model", str(model)]
    work, alone = (main_work(parse([*argv, "--lanes", lanes])) for lanes in ("2", "1"))
    assert compared(work, ["fused", "one_by_one", "peft"])["max_relative_difference"] <= SAME
    for user, row in alone.fused().items():
        assert (work.fused()[user] - row).norm() <= SAME * row.norm()


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "head"])
def test_a_peer_that_trains_a_part_only_is_noticed(part, folders, monkeypatch):
    """Losses alone would pass some: in few steps most of a loss's change is the head's."""
    task, model = folders
    work = main_work(parse(["--task", str(task), "--model", str(model)]))
    method, base, made = work.jobs[0].config.method, work.base, work.peft()

    def in_part():
        for user, row in made.items():
            old = method.tensors(method.initial_row(base, work.jobs[0].config.seed, user), base)
            yield user, method.row({name: old[name] if is_part(name) else new
                                    for name, new in method.tensors(row, base).items()}, base)  # fmt: skip

    is_part = {"head": lambda name: name.startswith("head."), "lora_A": lambda name: ".A" in name,
               "lora_B": lambda name: ".B" in name}[part]  # fmt: skip
    assert any(map(is_part, method.shapes(base)))
    monkeypatch.setattr(work, "peft", lambda: dict(in_part()))
    with pytest.raises(Apart):
        compared(work, ["fused", "one_by_one", "peft"])


@pytest.mark.parametrize("who", ["fused", "peft", "published"])
def test_a_contender_that_trains_something_else_is_noticed(folders, who, monkeypatch):
    task, model = folders
    work = main_work(parse(["--task", str(task), "--model", str(model)]))
    made = getattr(work, who)()
    monkeypatch.setattr(work, who, lambda: {user: 1.5 * row for user, row in made.items()})
    with pytest.raises(Apart):
        compared(work, ["fused", "one_by_one", "peft", "published"])


def test_states_that_are_not_those_of_the_layers_below_are_noticed(folders):
    task, model = folders
    work = main_work(parse(["--task", str(task), "--model", str(model), "--top-layers", "1"]))
    assert compared(work, ["fused", "one_by_one"])["max_trunk_difference"] <= SAME
    for kept in work.base.states:
        kept *= 1 + 1e-3 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Apart, match="kept states"):
        compared(work, ["fused", "one_by_one"])


@pytest.mark.parametrize("kind, sites", [("t5", "q,v"), ("gpt2", "o,up,down")])
def test_other_kinds_of_base_train_what_peft_and_the_published_protocol_train(kind, sites, folders, tmp_path):
    task, _ = folders
    model = MAKERS[kind](load_task(task), tmp_path)
    work = main_work(parse(["--task", str(task), "--model", str(model), "--sites", sites]))
    found = compared(work, bench_train.CONTENDERS)
    assert max(found["max_loss_difference"], found["max_published_loss_difference"]) <= SAME_LOSS
    ours = work.one_by_one()
    for user, row in work.peft().items():
        torch.testing.assert_close(row, ours[user], rtol=1e-3, atol=1e-5)
    if kind == "t5":  # inputs count as well
        asked = sum(len(q.prompt) for job in work.jobs for q in [job.train[i] for i in Run(job, 0, 0).upcoming])
        assert work.tokens(work.jobs, 1) > asked
    else:
        with pytest.raises(InputError, match="is a part of one in their GPT2"):
            peers.Peft(work.base, work.labels, bench_train.METHOD)


def test_a_base_in_bf16_is_one_in_bf16_to_peft_whatever_the_file_holds(folders, tmp_path):
    task, _ = folders
    model = MAKERS["decoder"](load_task(task), tmp_path / "base")
    weights = load_file(model / "model.safetensors")
    save_file({key: weight.bfloat16() for key, weight in weights.items()}, model / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    for dtype in ("float32", "bfloat16"):
        work = main_work(parse(["--task", str(task), "--model", str(model), "--dtype", dtype]))
        theirs = work.peer(peers.Peft).model
        assert {theirs.dtype, theirs.lm_head.weight.dtype, work.base.dtype} == {getattr(torch, dtype)}
        compared(work, bench_train.CONTENDERS)
    start = {job.user: job.config.method.initial_row(work.base, 0, job.user) for job in work.few}
    work.peft = lambda: start
    with pytest.raises(Apart, match="peft and one by one differ"):
        compared(work, bench_train.CONTENDERS)


def test_texts_that_are_too_long_for_the_published_protocol_are_cut_and_counted(folders, tmp_path, capsys, monkeypatch):
    task, _ = folders
    model = MAKERS["decoder"](load_task(task), tmp_path / "base")
    for where in (bench_train, peers):
        monkeypatch.setattr(where, "PUBLISHED_LENGTH", 8)
    argv = ["--task", str(task), "--model", str(model), "--no-curves"]
    assert bench.main(["train", *argv, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    (run,) = json.loads(out.splitlines()[-1])["runs"]
    assert run["num_cut"] == 0 < run["num_cut_published"] and run["max_published_loss_difference"] is not None
    assert f"0 to fit the base, {run['num_cut_published']} to fit the published protocol's 8 tokens" in out
    work = main_work(parse(argv))
    cut = [q for own in work.short.values() for q in own]
    answers = {work.labels.labels[q.label] for q in cut}
    assert max(len(q.prompt) for q in cut) == 7 and {len(answer) for answer in answers} == {1}
    assert len({q.prompt[-1] for q in cut}) == 1  # what asks for the answer is never cut


def test_adapters_that_differ_are_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contenders, "SAME", -1.0)
    assert bench.main(["train", "--users", "2", "--no-curves", "--out", str(tmp_path)]) == 1
    assert "fused and one by one differ" in capsys.readouterr().err.splitlines()[-1]


def test_a_point_of_the_curves_that_differs_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    measured = bench_train.measured

    def apart_at_three(work, contenders):
        if work.name == "random 1M" and len(work.jobs) == 1:
            raise Apart("random 1M: somebody differs")
        return measured(work, contenders)

    monkeypatch.setattr(bench_train, "measured", apart_at_three)
    assert bench.main(["train", "--users", "2", "--out", str(tmp_path)]) == 1
    assert "somebody differs" in capsys.readouterr().err.splitlines()[-1]
    assert len(json.loads((tmp_path / "result.json").read_text())["runs"]) == 5 and (tmp_path / "train.png").exists()


def test_padding_to_512_changes_no_gradient(folders):
    task, model = folders
    work = main_work(parse(["--task", str(task), "--model", str(model)]))
    assert work.published_steps == work.steps == 3  # from the second step on LoRA's A has a gradient, too
    tuned, published = work.peft(), work.published()
    for user, start in contenders._starts(work, tuned).items():
        assert (published[user] - tuned[user]).norm() <= 1e-2 * (tuned[user] - start).norm()


@pytest.mark.parametrize("who", ["fused", "peft"])
def test_a_process_of_its_own_says_what_memory_a_contender_takes(folders, who):
    task, model = folders
    found = MEMORY_OF(who, ["--task", str(task), "--model", str(model)])
    assert 0 < found["grown_mb"] < 200 < found["peak_mb"] < 3000


def test_a_process_that_ends_without_a_word_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr(bench_train.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="ended with code 1, without a word"):
        MEMORY_OF("peft", [])


def test_peers_load_no_weights_of_ours_and_kept_states_count_as_memory(folders):
    task, model = folders
    args = parse(["--task", str(task), "--model", str(model), "--top-layers", "1"])
    theirs, ours = main_work(args, weights=False), main_work(args)
    assert {weight.device.type for weight in theirs.base.parameters()} == {"meta"}
    assert theirs.base.sites == ours.base.sites and not isinstance(theirs.base, Trunk)
    peer = peers.Peft(theirs.base, theirs.labels, theirs.jobs[0].config.method, "cpu", torch.float32)
    own = peer.train(theirs.few[0], 2)
    torch.testing.assert_close(own, replace(ours, steps=2).one_by_one()[theirs.few[0].user], rtol=1e-3, atol=1e-5)
    weights = sum(weight.nbytes for weight in ours.base.parameters())
    assert bench_train.held(ours, "fused") == weights + sum(kept.nbytes for kept in ours.base.states)


def test_memory_above_the_limit_is_said(monkeypatch):
    sizes = {"fused": 400.0, "peft": 200.0}
    monkeypatch.setattr(bench_train, "memory_of", lambda who, _: {"peak_mb": 100.0, "grown_mb": sizes[who]})
    monkeypatch.setattr(bench_train, "resident_mb", lambda work: 50.0)
    found = bench_train.memory(SimpleNamespace(base=SimpleNamespace(device=torch.device("cpu"))), [])
    assert found["peak_within_limit"] and not found["grown_within_limit"]
    assert bench_train.memory_limit(found, "grown") == 350.0


def test_a_base_is_called_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_name(None) == "default" and base_name(Path("/models/all-MiniLM-L6-v2")) == "minilm"
    assert base_name(Path(".")) == base_name(Path("x/..")) == tmp_path.name
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(tmp_path, target_is_directory=True)
    assert base_name(tmp_path / "all-MiniLM-L6-v2") == "minilm"


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
    (["--published-steps", "4"], "--published-steps must be 1 to 3, got 4"),
    (["--bases", "1M,2M"], "--bases: there is no '2M'; choose of 1M, 8M, 25M"),
    (["--users", "0"], "--users must be at least 1, got 0"),
    (["--token-budget", "0"], "token_budget must be at least 1, got 0"),
    (["--users", "3", "--sites", "nowhere"], "nowhere"),
    (["--users", "3", "--top-layers", "9"], "this base has 2 layers"),
    (["--device", "warp"], "--device warp"),
    (["--device", "warp", "--model", "."], "--device warp"),
])  # fmt: skip
def test_bad_input_is_one_line(argv, message, tmp_path, capsys):
    assert bench.main(["train", *argv, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
