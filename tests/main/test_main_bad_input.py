"""Does every command meet bad input with one clear line, and leave a store as it was?"""

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
from commands import run, say

from minipeft.tasks.task import Task, load_task, save_task


def train(task, base, *more):
    return ["train", "--model", base, "--task", task, *more]


def bad_unknown_command(s):
    return ["fly"], "train"


def bad_no_command(s):
    return [], "COMMAND"


def bad_unknown_method(s):
    return train(s.task, s.base, "--method", "laura", "--store", s.new), "pfeiffer"


def bad_option_of_another_method(s):
    return train(s.task, s.base, "--method", "ia3", "--rank", 8, "--store", s.new), (
        "--rank is not an option of method ia3; it has --sites, --inputs")  # fmt: skip


def bad_unknown_option(s):
    return train(s.task, s.base, "--method", "ia3", "--fast", "--store", s.new), "--fast"


def bad_setting(s):
    return train(s.task, s.base, "--method", "ia3", "--epochs", 0, "--store", s.new), "epochs must be at least 1"


def bad_method_value(s):
    return train(s.task, s.base, "--method", "lora", "--rank", 0, "--store", s.new), "rank must be at least 1"


def bad_site(s):
    return train(s.task, s.base, "--method", "lora", "--sites", "query", "--store", s.new), "'query'"


def bad_both_kinds_of_shared(s):
    return train(s.task, s.base, "--method", "lora", "--on-shared", "--from-shared", "--store", s.new), "--from-shared"


def bad_num_users(s):
    return train(s.task, s.base, "--method", "lora", "--users", 7, "--store", s.new), "6 users"


def bad_no_users(s):
    return train(s.task, s.base, "--method", "lora", "--users", 0, "--store", s.new), "--users 0"


def bad_missing_task(s):
    return train(s.tmp / "nowhere", s.base, "--method", "lora", "--store", s.new), "nowhere"


def bad_missing_split(s):
    folder = shutil.copytree(s.task, s.tmp / "task")
    (folder / "val.jsonl").unlink()
    return train(folder, s.base, "--method", "lora", "--store", s.new), "val.jsonl"


def bad_user_without_validation(s):
    folder = shutil.copytree(s.task, s.tmp / "task")
    lines = (folder / "val.jsonl").read_text().splitlines(keepends=True)
    (folder / "val.jsonl").write_text("".join(line for line in lines if '"ann"' not in line))
    return train(folder, s.base, "--method", "lora", "--store", s.new, "--on-bad", "stop"), (
        "user 'ann' has no validation example")  # fmt: skip


def bad_missing_model(s):
    return train(s.task, s.tmp / "nowhere", "--method", "lora", "--store", s.new), "nowhere"


def bad_device(s):
    return [*train(s.task, s.base, "--method", "lora", "--store", s.new), "--device", "tpu"], "--device tpu"


def bad_user_id_too_long(s):
    folder = shutil.copytree(s.task, s.tmp / "task")
    for file in folder.glob("*.jsonl"):
        file.write_text(file.read_text().replace('"bob"', f'"{"b" * 70000}"'))
    return (train(folder, s.base, "--method", "lora", "--on-bad", "stop", "--store", s.new),
            "has 70000 bytes; needed at most 65536")  # fmt: skip


def bad_store_with_these_users(s):
    return train(s.task, s.base, "--method", "lora", "--store", s.store), "already"


def bad_store_of_another_base(s):
    return train(s.task, s.other, "--method", "lora", "--store", s.store), "belongs to base 'decoder' ("


def bad_store_of_another_task(s):
    folder = shutil.copytree(s.task, s.tmp / "task")
    header = json.loads((folder / "task.json").read_text()) | {"name": "other", "instruction": "What else?"}
    (folder / "task.json").write_text(json.dumps(header))
    return train(folder, s.base, "--method", "lora", "--again", "--store", s.store), "'other' has other instruction"


def bad_store_is_a_folder_of_other_things(s):
    return train(s.task, s.base, "--method", "lora", "--store", s.task), "is no store and not empty"


def bad_store_is_a_file(s):
    (s.tmp / "file").write_text("")
    return train(s.task, s.base, "--method", "lora", "--store", s.tmp / "file"), "file"


def bad_predict_with_another_base(s):
    return ["predict", "--store", s.store, "--model", s.other, "--user", "ann", "--text", "a"], "not to 'gpt2' ("


def bad_predict_unknown_user(s):
    return ["predict", "--store", s.store, "--model", s.base, "--user", "zoe", "--text", "a"], "'zoe'"


def bad_predict_without_user(s):
    return ["predict", "--store", s.store, "--model", s.base, "--text", "a"], "--user"


def bad_predict_empty_text(s):
    return ["predict", "--store", s.store, "--model", s.base, "--user", "ann", "--text", " "], "text is empty"


def bad_predict_unknown_user_in_a_line(s):
    lines = b'{"user": "ann", "text": "a"}', b'{"user": "zoe", "text": "a"}'
    return ["predict", "--store", s.store, "--model", s.base], "line 2: no adapter of user 'zoe'", *lines


def bad_predict_line_is_no_json(s):
    return ["predict", "--store", s.store, "--model", s.base], "line 1 is not JSON", b"hello"


def bad_predict_line_without_text(s):
    return ["predict", "--store", s.store, "--model", s.base], 'line 1 has no "text"', b'{"user": "ann"}'


def bad_predict_line_is_a_list(s):
    return ["predict", "--store", s.store, "--model", s.base], 'line 1 has no "user"', b"[1]"


def bad_predict_line_is_not_utf8(s):
    return ["predict", "--store", s.store, "--model", s.base], "line 1 is not JSON in UTF-8", b'{"user": "\xff"}'


def bad_predict_line_with_half_a_character(s):
    line = b'{"user": "ann", "text": "\\ud800"}'
    return ["predict", "--store", s.store, "--model", s.base], "line 1 is not JSON in UTF-8", line


def bad_predict_text_is_not_utf8(s):
    return ["predict", "--store", s.store, "--model", s.base, "--user", "ann"], "the text is not UTF-8", b"\xff"


def bad_eval_with_another_base(s):
    return ["eval", "--store", s.store, "--model", s.other, "--task", s.task], "belongs to base 'decoder' ("


def bad_eval_of_nobody(s):
    everybody = load_task(s.task)
    rename = lambda split: {f"{user}!": [replace(e, user=f"{user}!") for e in examples]  # noqa: E731
                            for user, examples in split.items()}  # fmt: skip
    strangers = Task(everybody.name, everybody.instruction, everybody.labels, False,
                     *(rename(everybody.split(name)) for name in ("train", "val", "test")))  # fmt: skip
    save_task(strangers, s.tmp / "task")
    return ["eval", "--store", s.store, "--model", s.base, "--task", s.tmp / "task"], "has both an adapter"


def bad_eval_no_store(s):
    return ["eval", "--store", s.tmp, "--model", s.base, "--task", s.task], "is no store"


def bad_users_no_store(s):
    return ["users", "--store", s.tmp / "nowhere"], "is no store"


def bad_users_broken_store(s):
    (s.tmp / "index.sqlite").write_text("SQLite format 3")
    return ["users", "--store", s.tmp], "index.sqlite is damaged"


def bad_users_of_the_old_layout(s):
    (s.tmp / "store.json").write_text("{}")
    return ["users", "--store", s.tmp], "a store of an earlier minipeft"


def bad_store_no_store(s):
    return ["store", "verify", "--store", s.tmp / "nowhere"], "is no store"


def bad_store_unknown_action(s):
    return ["store", "burn", "--store", s.store], "verify"


def bad_store_delete_nobody(s):
    return ["store", "delete", "--store", s.store], "store delete takes a --user"


def bad_store_compact_somebody(s):
    return ["store", "compact", "--store", s.store, "--user", "ann"], "store compact takes no --user"


def bad_store_delete_unknown_user(s):
    return ["store", "delete", "--store", s.store, "--user", "zoe"], "'zoe'"


def bad_rows(s):
    return train(s.task, s.base, "--method", "lora", "--rows", "fp4", "--store", s.new), "'fp4'"


def bad_other_rows(s):
    return train(s.task, s.base, "--method", "lora", "--again", "--rows", "int8", "--store", s.store), "keeps rows as"


def bad_methods_no_model(s):
    return ["methods", "--model", s.tmp], "config.json"


def bad_export_unknown_user(s):
    return ["export", "--store", s.store, "--user", "zoe", "--to", s.new, "--format", "peft"], "'zoe'"


def bad_export_format(s):
    return ["export", "--store", s.store, "--user", "ann", "--to", s.new, "--format", "zip"], "peft"


BAD = {name: function for name, function in globals().items() if name.startswith("bad_")}


def content(store):
    """What a store holds; how SQLite shares it out among its own files is SQLite's affair."""
    files = {path: path.read_bytes() for path in store.rglob("*") if path.is_file() and "index.sqlite" not in path.name}
    with closing(sqlite3.connect(store / "index.sqlite")) as index:
        return files, list(index.iterdump())


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_and_exit_code_2(make, task, bases, stores, tmp_path, capsys, monkeypatch, fake):
    base, store = bases["decoder"], stores["decoder"]
    before = content(store)
    argv, named, *lines = make(SimpleNamespace(task=task, base=base, other=bases["gpt2"], store=store, tmp=tmp_path,
                                               new=tmp_path / "new"))  # fmt: skip
    say(monkeypatch, b"\n".join(lines))
    assert run(*argv) == 2
    streams = capsys.readouterr()
    assert streams.err.count("\n") == 1 and streams.err.startswith("minipeft: ") and named in streams.err, streams.err
    assert "hello" not in streams.err and streams.out == ""
    assert content(store) == before
    assert not (tmp_path / "new").exists()


def test_the_command_itself_exits_with_2_and_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, "-m", "minipeft", "users", "--store", str(tmp_path)], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("minipeft: ")


def test_a_reader_that_goes_away_is_no_error(stores):
    command = [sys.executable, "-m", "minipeft", "users", "--store", str(stores["decoder"])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
