"""Does Python do what the commands do, and do the README's lines run?"""

import re
import shlex
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from commands import printed, rows_of, run
from safetensors.torch import load_file, save_file

import minipeft
from minipeft import bench
from minipeft.engine import Engine
from minipeft.errors import InputError
from minipeft.methods.lora import LoRA
from minipeft.methods.prompt import PromptTuning
from minipeft.models.loading import fingerprint, load_model, load_tokenizer
from minipeft.options import NAMES
from minipeft.running import for_base, open_base
from minipeft.store import Store
from minipeft.tasks.task import load_task


def test_python_does_what_the_command_does(task, bases, stores, tmp_path):
    base, finished = load_model(bases["decoder"]), []
    before = fingerprint(base)
    store = minipeft.train(base, task, LoRA(rank=2), store=tmp_path / "store", epochs=2, learning_rate=0.01, seed=3,
                           on_finish=lambda adapter: finished.append(adapter.user))  # fmt: skip
    expected = rows_of(stores["decoder"], base)
    assert sorted(finished) == store.users()
    assert all(torch.equal(row, expected[user]) for user, row in rows_of(tmp_path / "store", base).items())
    result = minipeft.evaluate(base, store, load_task(task))
    assert minipeft.evaluate(bases["decoder"], stores["decoder"], task) == result
    text = load_task(task).test["ann"][0].text
    (ann, bob) = minipeft.predict(base, store, [("ann", text), ("bob", text)])
    assert ann.user == "ann" and bob.scores != ann.scores and ann.label == max(ann.scores, key=ann.scores.get)
    store.delete("ann")
    assert "ann" not in store and "bob" in store and len(store.users()) == 5
    with pytest.raises(InputError, match="no adapter of user 'ann'"):
        minipeft.predict(base, store, [("ann", text)])
    with pytest.raises(InputError, match="no adapter of user 'ann'"):
        store.delete("ann")
    assert fingerprint(base) == before


def test_python_refuses_what_it_cannot_do(task, bases, tmp_path):
    base = open_base(bases["decoder"], 2)
    with pytest.raises(InputError, match="shared is 'above'"):
        minipeft.train(base, task, store=tmp_path / "store", shared="above")
    with pytest.raises(TypeError, match="steps"):
        minipeft.train(base, task, store=tmp_path / "store", steps=3)
    base.origin = None
    with pytest.raises(InputError, match="Decoder came from no folder"):
        minipeft.train(base, task, store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_methods_default_sites_are_those_the_base_has(bases):
    gpt2, llama = (open_base(bases[kind], 2) for kind in ("gpt2", "decoder"))
    assert for_base(LoRA(), llama) == LoRA()
    assert for_base(LoRA(), gpt2) == LoRA(sites=("q", "k", "v", "o", "up", "down"))
    chosen = LoRA(sites=("q", "gate"))
    assert for_base(chosen, gpt2) == chosen, "what was chosen is refused by check, not left out"
    spelled_out = for_base(LoRA(sites=tuple(LoRA().sites)), gpt2)
    with pytest.raises(InputError, match="no site of this base is called 'gate'"):
        spelled_out.check(gpt2)
    assert for_base(PromptTuning(), gpt2) == PromptTuning()


def test_the_readmes_commands_and_python_run(task, bases, tmp_path, capsys, monkeypatch, fake):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases["decoder"], "base")
    shutil.copytree(task, "task")
    Path("questions.jsonl").write_text('{"user": "bob", "text": "a"}\n{"user": "ann", "text": "b"}\n')
    readme = (Path(__file__).parents[2] / "README.md").read_text().split("## Use it")[1].split("\n## ")[0]
    assert f"# {len(NAMES)} methods" in readme
    shell, python, _ = re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in shell.splitlines()]
    assert {words[3] for words in commands} == {"methods", "train", "users", "eval", "predict", "export", "import",
                                                "store"}  # fmt: skip
    for words in commands:
        assert words[:3] == ["python", "-m", "minipeft"]
        if "<" in words:
            monkeypatch.setattr(sys, "stdin", open(words[-1]))
            words = words[: words.index("<")]
        assert run(*words[3:]) == 0, capsys.readouterr().err
    exec(python, {})
    assert {path.name for path in tmp_path.iterdir()} >= {"store", "python-store"}


def test_prompts_start_from_a_text(bases, task, tmp_path, capsys):
    argv = ("train", "--model", bases["decoder"], "--task", task, "--users", 1, "--epochs", 1, "--learning-rate", 1e-9,
            "--weight-decay", 0)  # fmt: skip
    assert run(*argv, "--method", "prompt", "--tokens", 9, "--start-text", "so be it", "--store", tmp_path / "a") == 0
    base, tokenizer = open_base(bases["decoder"], 2), load_tokenizer(bases["decoder"])
    ids = tokenizer.encode("so be it", add_special_tokens=False).ids
    ((user, row),) = rows_of(tmp_path / "a", base).items()
    method = Store(tmp_path / "a").get(user, base).method
    expected = base.embed.weight[torch.tensor((ids * 9)[:9])]
    torch.testing.assert_close(method.tensors(row, base)["prompt"], expected, atol=1e-6, rtol=0)
    capsys.readouterr()
    prompt = ("--method", "prompt")
    for options, message in ((("--method", "lora", "--start-text", "so"), "is an option of --method prompt"),
                             ((*prompt, "--tokens", 1, "--start-text", "so be it, said they"), "raise tokens"),
                             ((*prompt, "--start-from", "text", "--text", 10**6), "token ids 1000000"),
                             (("--method", "lora", "--ranks", "zzz=4"), "'zzz' has a rank or alpha of its own"),
                             (("--method", "houlsby", "--reduction", 0), "reduction is 0"),
                             (("--method", "houlsby", "--reduction", "nan"), "reduction is nan"),
                             (("--method", "lora", "--dropout", 0.001), "in steps of 1/256")):
        assert run(*argv[:9], *options, "--store", tmp_path / "b") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_an_imported_adapter_is_evaluated_on_the_task_given(bases, task, tmp_path, capsys):
    """And a folder that is refused leaves no store behind."""
    base, store, new = bases["decoder"], tmp_path / "store", tmp_path / "new"
    argv = ("train", "--model", base, "--task", task, "--method", "lora", "--users", 1, "--epochs", 1)
    assert run(*argv, "--store", store) == 0
    (user,) = Store(store).users()
    folder = tmp_path / "exported"
    assert run("export", "--store", store, "--user", user, "--to", folder, "--format", "peft") == 0
    assert run("import", "--from", folder, "--user", user, "--store", new, "--model", bases["t5"]) == 2
    assert run("import", "--from", tmp_path / "nowhere", "--user", user, "--store", new, "--model", base) == 2
    assert not new.exists()
    assert run("import", "--from", folder, "--user", user, "--store", new, "--model", base) == 0
    capsys.readouterr()
    results = []
    for one in (store, new):
        assert run("eval", "--store", one, "--model", base, "--task", task, "--json") == 0
        results.append(printed(capsys))
    assert results[0] == results[1]
    (tmp_path / "file").write_text("")
    assert run("export", "--store", store, "--user", user, "--to", tmp_path / "file" / "x", "--format", "peft") == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_warning_is_one_line_on_stderr(bases, tmp_path, capsys):
    folder = shutil.copytree(bases["bert"], tmp_path / "base")
    weights = {f"bert.{key}": weight for key, weight in load_file(folder / "model.safetensors").items()}
    weights["bert.embeddings.word_embeddings.weight"][3, :2] = torch.nan
    save_file(weights | {"cls.predictions.bias": torch.zeros(400)}, folder / "model.safetensors")
    assert run("methods", "--model", folder) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"minipeft: {folder}: ") for line in lines)
    assert "2 numbers in 1 tensors are NaN" in lines[0] and "1 tensors of heads are not used (cls)" in lines[1]


def test_a_store_remembers_how_texts_are_pooled(task, bases, tmp_path, capsys):
    base, store = load_model(bases["bert"]), tmp_path / "store"
    assert run("train", "--model", bases["bert"], "--task", task, "--method", "lora", "--store", store, "--users", 2,
               "--epochs", 1, "--pooling", "pooler", "--recompute") == 0  # fmt: skip
    assert Store(store).pooling == "pooler"
    assert run("predict", "--store", store, "--model", bases["bert"], "--user", "ann", "--text", "a", "--json") == 0
    scores = printed(capsys)["scores"]
    with closing(sqlite3.connect(store / "index.sqlite", isolation_level=None)) as index:
        index.execute("UPDATE about SET value = 'mean' WHERE name = 'pooling'")
    assert run("predict", "--store", store, "--model", bases["bert"], "--user", "ann", "--text", "a", "--json") == 0
    assert printed(capsys)["scores"] != scores
    with pytest.raises(InputError, match="belongs to pooling 'mean', not 'pooler'"):
        Store(store).get("ann", open_base(base, 2, "pooler"))
    assert run("train", "--model", bases["gpt2"], "--task", task, "--method", "lora", "--store", tmp_path / "other",
               "--pooling", "pooler") == 2  # fmt: skip
    assert "pooling 'pooler' is for encoders" in capsys.readouterr().err


def test_dtype_pooling_and_recompute_reach_training(task, bases, tmp_path, capsys, monkeypatch):
    def stop(self, *args, **options):
        raise InputError(f"{self.model.dtype}, {self.model.pooling}, {self.passes.recompute}")

    monkeypatch.setattr(Engine, "run", stop)
    common = "--model", bases["bert"], "--task", task, "--users", 2
    chosen = "--dtype", "bfloat16", "--pooling", "pooler", "--recompute"
    for options, expected in (((), "torch.float32, mean, False"), (chosen, "torch.bfloat16, pooler, True")):
        store = tmp_path / f"store {len(options)}"
        assert run("train", *common, "--method", "lora", "--store", store, *options) == 2
        assert capsys.readouterr().err == f"minipeft: {expected}\n"
        assert bench.main([str(arg) for arg in (*common, "--out", tmp_path / "out", *options)]) == 2
        assert capsys.readouterr().err == f"minipeft.bench: {expected}\n"


def test_a_bf16_base_trains_and_answers_in_bf16_alone(task, bases, tmp_path, capsys):
    store, model = tmp_path / "store", ("--model", bases["decoder"])
    assert run("train", *model, "--task", task, "--method", "lora", "--store", store, "--users", 2, "--epochs", 1,
               "--dtype", "bfloat16") == 0  # fmt: skip
    ask_ann = "predict", *model, "--store", store, "--user", "ann", "--text", "a"
    assert run(*ask_ann, "--dtype", "bfloat16") == 0
    assert run("eval", *model, "--store", store, "--task", task, "--dtype", "bfloat16") == 0
    capsys.readouterr()
    assert run(*ask_ann) == 2 and "in the dtype that it had" in capsys.readouterr().err
    assert run(*ask_ann, "--dtype", "float16") == 2
    assert "'float16' is none of float32, bfloat16; fp16 passes its range" in capsys.readouterr().err
