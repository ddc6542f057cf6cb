"""Does `python -m minipeft.bench` do its job, and does it meet bad input and Ctrl-C like a good tool?"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from small_bases import MAKERS

from minipeft import bench, default_base
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import load_model, save_model
from minipeft.store import Store
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import load_task, save_task


@pytest.fixture(scope="module", autouse=True)
def small_and_quick(tmp_path_factory):
    """A base of a few steps in a cache of its own; the trial and the plans stay as they are."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MINIPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(default_base, "STEPS", 4)
    patch.setattr(default_base, "SHAPE", default_base.SHAPE | dict(width=32, num_layers=2, mlp_width=64, head_dim=8))
    patch.setattr(bench, "TRIAL_STEPS", 12)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    config = SyntheticConfig(users=6, max_examples=24, test_examples=5, texts=60)
    folder = tmp_path_factory.mktemp("task")
    save_task(make_synthetic(config)[0], folder)
    return folder


def run(*argv) -> int:
    return bench.main([str(arg) for arg in argv])


KEYS = """suite task num_users fused.users_per_s fused.tokens_per_s one_by_one.users_per_s speedup accuracy.own_majority
accuracy.base accuracy.shared accuracy.personal accuracy.ceiling_shared accuracy.ceiling_personal
independence.max_relative_difference independence.bitwise_isolated versions seconds""".split()


def test_a_task_run_writes_and_prints_the_same_result(task_folder, tmp_path, capsys):
    assert run("--task", task_folder, "--out", tmp_path) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "result.json").read_text())
    for key in KEYS:
        value = printed
        for part in key.split("."):
            value = value[part]
        assert (value is None) == key.startswith("accuracy.ceiling"), key
    assert printed["num_users"] == 6
    assert printed["speedup"] == pytest.approx(
        printed["fused"]["users_per_s"] / printed["one_by_one"]["users_per_s"])
    assert printed["independence"]["max_relative_difference"] < 1e-5
    assert printed["independence"]["bitwise_isolated"] is True
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
    assert len(Store(tmp_path / "adapters").users()) == 6


def test_synthetic_users_have_known_ceilings_and_the_users_asked_for(tmp_path, capsys):
    assert run("--users", 3, "--seed", 5, "--out", tmp_path) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_users"] == 3 and result["seed"] == 5
    assert result["accuracy"]["ceiling_shared"] < result["accuracy"]["ceiling_personal"] <= 100


def test_an_earlier_result_in_the_same_folder_is_replaced(task_folder, tmp_path, capsys):
    assert run("--task", task_folder, "--out", tmp_path) == 0
    assert run("--task", task_folder, "--users", 2, "--out", tmp_path) == 0
    assert json.loads((tmp_path / "result.json").read_text())["num_users"] == 2
    assert len(Store(tmp_path / "adapters").users()) == 2


def test_ctrl_c_leaves_a_message_and_every_finished_adapter(task_folder, tmp_path, capsys, monkeypatch):
    add = Store.add

    def add_then_interrupt(store, adapter, base):
        add(store, adapter, base)
        if len(store.users()) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Store, "add", add_then_interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores Ctrl-C
    try:
        assert run("--task", task_folder, "--out", tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    assert "interrupted" in error and "Traceback" not in error and str(tmp_path / "adapters") in error
    store = Store(tmp_path / "adapters")
    base = load_model(store.base.folder)
    assert len(store.users()) == 2
    for adapter in store.get_many(store.users(), base):
        assert torch.isfinite(adapter.row).all()


def model_folder(tmp_path):
    """A loadable random base whose tokenizer is the default base's kind."""
    task, _ = make_synthetic(SyntheticConfig(users=2, max_examples=24, test_examples=5, texts=60))
    tokenizer = default_base.train_tokenizer(task)
    config = DecoderConfig(tokenizer.get_vocab_size(), 32, 1, 2, 2, 16, 48, tied_head=True)
    save_model(default_base.initialise(Decoder(config), 0), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_a_model_folder_serves_as_the_base(task_folder, tmp_path, capsys):
    folder = model_folder(tmp_path)
    assert run("--task", task_folder, "--model", folder, "--users", 2, "--out", tmp_path / "out") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["base"] == "model"


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_other_kinds_of_base_serve_too(kind, task_folder, tmp_path, capsys):
    folder = MAKERS[kind](load_task(task_folder), tmp_path / kind)
    assert run("--task", task_folder, "--model", folder, "--users", 2, "--out", tmp_path / "out") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["base"] == kind and (result["accuracy"]["base"] is None) == (kind == "bert")
    assert result["independence"] == {"max_relative_difference": pytest.approx(0, abs=1e-5), "bitwise_isolated": True}


def bad_missing_model(tmp_path, task):
    return ["--model", tmp_path / "nowhere"], "nowhere"


def bad_not_a_model(tmp_path, task):
    (tmp_path / "empty").mkdir()
    return ["--model", tmp_path / "empty"], "config.json"


def bad_architecture(tmp_path, task):
    folder = model_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "gpt_oss"}
    (folder / "config.json").write_text(json.dumps(config))
    return ["--model", folder], "qwen3"


def bad_truncated_weights(tmp_path, task):
    folder = model_folder(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return ["--model", folder], "model.safetensors"


def bad_missing_task(tmp_path, task):
    return ["--task", tmp_path / "nowhere"], "nowhere"


def bad_line(tmp_path, task):
    folder = shutil.copytree(task, tmp_path / "task")
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[4] = lines[4][:20]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return ["--task", folder], "train.jsonl:5"


def bad_untrained_user(tmp_path, task):
    folder = shutil.copytree(task, tmp_path / "task")
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(line for line in lines if "user00002" not in line) + "\n")
    return ["--task", folder], "user00002"


def bad_num_users(tmp_path, task):
    return ["--users", "0"], "--users"


def bad_too_many_users(tmp_path, task):
    return ["--task", task, "--users", "7"], "6 users"


def bad_out_is_a_file(tmp_path, task):
    (tmp_path / "file").write_text("")
    return ["--out", tmp_path / "file"], "--out"


def bad_out_below_a_file(tmp_path, task):
    (tmp_path / "file").write_text("")
    return ["--out", tmp_path / "file" / "below"], "--out"


def bad_out_with_a_result_that_cannot_be_written(tmp_path, task):
    (tmp_path / "out" / "result.json").mkdir(parents=True)
    return ["--out", tmp_path / "out"], "--out"


def bad_device(tmp_path, task):
    return ["--device", "cuda"], "--device"


def bad_users_is_no_number(tmp_path, task):
    return ["--users", "many"], "--users: invalid int value"


def bad_suite(tmp_path, task):
    return ["slow"], "quick"


def bad_user_id_too_long(tmp_path, task):
    folder = shutil.copytree(task, tmp_path / "task")
    for file in folder.glob("*.jsonl"):
        file.write_text(file.read_text().replace("user00002", "u" * 70_000))
    return ["--task", folder], "has 70000 bytes; needed at most 65536"


BAD = {name: function for name, function in globals().items() if name.startswith("bad_")}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_and_exit_code_2(make, task_folder, tmp_path, capsys):
    argv, named = make(tmp_path, task_folder)
    if "--out" not in argv:
        argv += ["--out", tmp_path / "out"]
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("minipeft.bench: "), error
    assert named in error


def test_bad_input_leaves_an_earlier_result_alone(task_folder, tmp_path, capsys):
    (tmp_path / "adapters").mkdir()
    for name in ("adapters/ann.safetensors", "result.json"):
        (tmp_path / name).write_text("{}")
    for argv in (["--task", tmp_path / "nowhere"], ["--task", task_folder, "--model", tmp_path / "nowhere"]):
        assert run(*argv, "--out", tmp_path) == 2
    assert (tmp_path / "adapters" / "ann.safetensors").exists() and (tmp_path / "result.json").exists()


def test_a_cache_that_cannot_be_written_is_found_out_before_training(task_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(default_base, "train_decoder", None)
    assert run("--task", task_folder, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "set MINIPEFT_CACHE to a folder that can" in error


def test_one_user_is_isolated_from_nobody(task_folder, tmp_path, capsys):
    assert run("--task", task_folder, "--users", 1, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["independence"]["bitwise_isolated"] is None
    assert "one user's examples rewritten: there is nobody else" in out


def test_the_command_itself_exits_with_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "minipeft.bench", "--users", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["minipeft.bench: --users must be at least 1, got 0"]
