"""Does a task folder come back as it was saved, and is every wrong one refused in one line that quotes no text?"""

import json
import math

import pytest

from minipeft.errors import InputError
from minipeft.tasks.task import (
    SPLITS,
    Example,
    Task,
    load_task,
    macro_accuracy,
    nominal_alpha,
    own_majority,
    save_task,
)

SECRET = "words nobody may see in an error"


def make_task(train, test=None, val=None, labels=("no", "yes"), multi_label=False):
    """From {user: [(id, label or labels)]}; users without val or test examples get empty lists."""
    def split(answers):
        return {user: [Example(user, id_, f"{SECRET} {id_}", (label,) if isinstance(label, str) else label)
                       for id_, label in (answers or {}).get(user, [])] for user in train}
    return Task("demo", "Answer no or yes.", labels, multi_label, split(train), split(val), split(test))


def small_task():
    return make_task({"ann": [("t1", "no"), ("t2", "yes")], "bob": [("t1", "yes")]},
                     test={"ann": [("t4", "no")], "bob": [("t4", "no"), ("t3", "yes")]}, val={"ann": [("t3", "no")]})


def test_saved_task_comes_back_equal(tmp_path):
    awkward = Example("Zoë\n", "id 7", "line one\nline two\u2028\"quoted\" \U0001f600 {}", ("no", "yes"))
    task = make_task({"ann": [("t1", ("no",))], "bob": [("t1", ("yes", "no"))]}, multi_label=True)
    task.train[awkward.user] = [awkward]
    task.val[awkward.user] = task.test[awkward.user] = []
    save_task(task, tmp_path / "new" / "folder")
    loaded = load_task(tmp_path / "new" / "folder")
    assert loaded == task
    assert loaded.users == ("ann", "bob", "Zoë\n")


def test_users_may_be_interleaved_in_the_file_and_keep_their_own_order(tmp_path):
    save_task(small_task(), tmp_path)
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))).removesuffix(b"\n"))
    task = load_task(tmp_path)
    assert task.users == ("bob", "ann")
    assert [example.id for example in task.train["ann"]] == ["t2", "t1"]


def test_further_fields_are_not_read(tmp_path):
    save_task(small_task(), tmp_path)
    edit_line(tmp_path, "train", 1, lambda line: line | {"round": 3})
    edit_header(tmp_path, lambda header: header | {"statistics": {"alpha": 0.1}})
    assert load_task(tmp_path) == small_task()


# ---------------------------------------------------------------------------------------------- wrong folders


def edit_line(folder, split, number, change):
    path = folder / f"{split}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number - 1] = json.dumps(change(json.loads(lines[number - 1])))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def edit_header(folder, change):
    path = folder / "task.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def set_field(split, number, **fields):
    return lambda folder: edit_line(folder, split, number, lambda line: line | fields)


def drop_field(split, number, name):
    return lambda folder: edit_line(folder, split, number, lambda line: {k: v for k, v in line.items() if k != name})


def set_header(**fields):
    return lambda folder: edit_header(folder, lambda header: header | fields)


def drop_header(name):
    return lambda folder: edit_header(folder, lambda header: {k: v for k, v in header.items() if k != name})


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


WRONG = {  # what is done to the saved small task: what the error must say
    "no task.json": (lambda folder: (folder / "task.json").unlink(), ["task.json", "No such file"]),
    "no val file": (lambda folder: (folder / "val.jsonl").unlink(), ["val.jsonl", "No such file"]),
    "broken line": (write("val.jsonl", f'{{"user": "ann", "text": "{SECRET}'.encode()), ["val.jsonl:1", "not JSON"]),
    "blank line": (write("val.jsonl", b"\n"), ["val.jsonl:1", "not JSON"]),
    "not UTF-8": (write("val.jsonl", SECRET.encode() + b"\xff\n"), ["val.jsonl:1", "not UTF-8"]),
    "too deep": (write("val.jsonl", b"[" * 100_000), ["val.jsonl:1", "too deep"]),
    "a list": (write("test.jsonl", f'["{SECRET}"]'.encode()), ["test.jsonl:1", "list", "object"]),
    "no text": (drop_field("train", 2, "text"), ["train.jsonl:2", '"text"', "no field"]),
    "no label": (drop_field("test", 3, "label"), ["test.jsonl:3", '"label"', "no field"]),
    "id a number": (set_field("train", 1, id=7), ["train.jsonl:1", '"id"', "int", "needed str"]),
    "label a string": (set_field("train", 1, label="no"), ["train.jsonl:1", '"label"', "str", "needed list"]),
    "label of numbers": (set_field("train", 1, label=[1]), ["train.jsonl:1", '"label"', "strings"]),
    "label unknown": (set_field("train", 3, label=["maybe"]), ["train.jsonl:3", "'maybe'", "'no', 'yes'"]),
    "text as label": (set_field("train", 3, label=[SECRET]), ["train.jsonl:3", f"{len(SECRET)} characters"]),
    "no label at all": (set_field("train", 3, label=[]), ["train.jsonl:3", "0 label(s)", "exactly one"]),
    "two labels": (set_field("train", 3, label=["no", "yes"]), ["train.jsonl:3", "2 label(s)", "multi_label"]),
    "label twice": (set_field("train", 3, label=["no", "no"]), ["train.jsonl:3", "twice"]),
    "empty text": (set_field("test", 2, text=" \n"), ["test.jsonl:2", '"text" is empty']),
    "empty user": (set_field("test", 2, user=""), ["test.jsonl:2", '"user" is empty']),
    "half a character": (set_field("test", 2, text=SECRET + "\ud83d"), ["test.jsonl:2", '"text"', "surrogate"]),
    "same id in split": (set_field("train", 2, id="t1"), ["train.jsonl:2", "train.jsonl:1", "'ann'", "'t1'"]),
    "same id in two splits": (set_field("test", 1, id="t2"), ["test.jsonl:1", "train.jsonl:2", "'ann'", "'t2'"]),
    "user never trained": (set_field("test", 3, user="eve"), ["train.jsonl", "1 user(s)", "'eve'"]),
    "nobody trained": (write("train.jsonl", b""), ["train.jsonl is empty"]),
    "header broken": (write("task.json", b"{"), ["task.json", "not JSON"]),
    "header without labels": (drop_header("labels"), ["task.json", '"labels"', "no field"]),
    "header without multi_label": (drop_header("multi_label"), ["task.json", '"multi_label"', "no field", "bool"]),
    "multi_label a number": (set_header(multi_label=0), ["task.json", '"multi_label"', "int", "needed bool"]),
    "one label": (set_header(labels=["no"]), ["task.json", "1 label(s)", "at least 2"]),
    "header's label twice": (set_header(labels=["no", "yes", "no"]), ["task.json", "twice"]),
    "name a number": (set_header(name=1), ["task.json", '"name"', "int"]),
    "name empty": (set_header(name=" "), ["task.json", '"name" is empty', "80 bytes"]),
    "name too long for a file": (set_header(name="ü" * 41), ["task.json", '"name"', "80 bytes"]),
    "name of two lines": (set_header(name="a\nb"), ["task.json", '"name"', "not printable"]),
}


@pytest.mark.parametrize("damage, said", WRONG.values(), ids=WRONG.keys())
def test_wrong_folder_is_refused_in_one_line(tmp_path, damage, said):
    save_task(small_task(), tmp_path)
    load_task(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        load_task(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message
    assert all(part in message for part in said), message


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_task(tmp_path / "nowhere")


def test_many_untrained_users_are_counted_and_the_first_named(tmp_path):
    task = make_task({"ann": [("t1", "no")], "bob": [("t1", "yes")]})
    save_task(task, tmp_path)
    lines = [json.dumps({"user": f"new{index}", "id": "t1", "text": "x", "label": ["no"]}) for index in range(9)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"9 user\(s\).*'new0', 'new1', 'new2', 'new3', 'new4' and 4 more"):
        load_task(tmp_path)


# ---------------------------------------------------------------------------------------------- helpers and figures


def test_subset_pooled_and_split():
    task = small_task()
    assert [(each.user, each.id) for each in task.pooled("test")] == [("ann", "t4"), ("bob", "t4"), ("bob", "t3")]
    only = task.subset(["bob"])
    assert only.users == ("bob",) and all(only.split(name) == {"bob": task.split(name)["bob"]} for name in SPLITS)
    assert task.with_training(2).users == ("ann",)
    with pytest.raises(InputError, match="no user 'eve'"):
        task.subset(["ann", "eve"])
    with pytest.raises(InputError, match="no split 'dev'"):
        task.split("dev")


def test_macro_accuracy_weighs_users_not_examples():
    task = small_task()
    assert macro_accuracy(task, {"ann": [("no",)], "bob": [("yes",), ("no",)]}) == 50.0
    assert macro_accuracy(task, {"ann": [("yes",)], "bob": [("no",), ("no",)]}) == 25.0
    with pytest.raises(InputError, match="'bob' came with 1 predictions; needed 2"):
        macro_accuracy(task, {"ann": [("no",)], "bob": [("yes",)]})
    with pytest.raises(InputError, match="test example"):
        macro_accuracy(make_task({"ann": [("t1", "no")]}), {})


def test_own_majority_learns_from_train_only_and_breaks_ties_by_label_order():
    train = {"ann": [("t1", "yes"), ("t2", "yes"), ("t3", "no")], "bob": [("t1", "yes"), ("t2", "no")],
             "eve": [("t1", "no")]}
    test = {"ann": [("t4", "no"), ("t5", "no"), ("t6", "no"), ("t7", "yes")], "bob": [("t4", "no"), ("t5", "no")]}
    assert own_majority(make_task(train, test)) == (25 + 100) / 2            # eve has no test example: not counted


def test_own_majority_of_label_sets():
    train = {"ann": [("t1", ("no", "yes")), ("t2", ("yes", "no")), ("t3", ("no",))]}
    test = {"ann": [("t4", ("yes", "no")), ("t5", ("yes",))]}
    assert own_majority(make_task(train, test, multi_label=True)) == 50.0


def test_alpha_by_hand():
    # Values: no 3 times, yes once. Observed 2, expected (4 * 4 - 3 * 3 - 1) / 3 = 2. Text t3 has one user: no unit.
    task = make_task({"ann": [("t1", "no"), ("t2", "no"), ("t3", "yes")], "bob": [("t1", "no"), ("t2", "yes")]})
    assert nominal_alpha(task) == 0.0
    assert nominal_alpha(make_task({"ann": [("t1", "no")], "bob": [("t1", "no")]})) == 1.0
    assert math.isnan(nominal_alpha(make_task({"ann": [("t1", "no")], "bob": [("t2", "no")]})))
