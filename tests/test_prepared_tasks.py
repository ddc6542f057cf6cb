"""Is a prepared task, read back, what was split, and the same bytes whatever the hash seed, locale or folder order?"""

import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import pytest
from common import Collector, Task, main
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import RawFile, Source
from splits import KINDS, SPLIT_NAMES, drop_small_users, is_new_user

from minipeft.errors import InputError
from minipeft.tasks import task as task_file
from minipeft.tasks.task import load_new_users, load_task

SCRIPTS = Path(__file__).resolve().parents[1] / "data_scripts"
SOURCE = Source("made_up", ("made_up",), (RawFile("votes.csv"),), "CC0-1.0", "https://example.org", "nobody")
LABELS = ("blue", "green", 'a "quoted"\nlabel')


def prepare(folder, task, *options):
    (folder / "raw/made_up").mkdir(parents=True, exist_ok=True)
    argv = ["--raw", str(folder / "raw"), "--out", str(folder / "out"), *options]
    status = main(SOURCE, lambda raw: [task], argv)
    return status, folder / "out" / task.name


def made_up_task(examples, **fields):
    return Task("made_up", "Which colour?", LABELS, multi_label=True, examples=examples, **fields)


visible = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)


@st.composite
def tasks(draw):
    """Three users and some texts with awkward names, each user with their own share of the texts and random labels."""
    users, words = (draw(st.lists(visible, min_size=3, max_size=3, unique=True)) for _ in range(2))
    rng = random.Random(draw(st.integers(0, 2**32)))
    collect = Collector()
    for user in users:
        for number in rng.sample(range(30), rng.randint(10, 30)):
            word = words[number % 3]
            collect.add(user, f"{word}{number}", word * number or word, rng.sample(LABELS, rng.randint(1, 2)))
    return made_up_task(collect.examples)


def as_loaded(splits, name):
    return {
        user: [(str(i), example["text"], tuple(example["label"])) for i, example in own[name].items()]
        for user, own in splits.items()
    }


@settings(max_examples=15, deadline=None, derandomize=True)
@given(task=tasks())
def test_what_is_loaded_is_what_was_split(task):
    with tempfile.TemporaryDirectory() as folder:
        _, out = prepare(Path(folder), task)
        for kind in KINDS:
            splits = drop_small_users(KINDS[kind](task.examples))
            if all(own["train"] for own in splits.values()):
                loaded = load_task(out, kind)
                for name in SPLIT_NAMES:
                    assert {user: [(each.id, each.text, each.label) for each in own]
                            for user, own in loaded.split(name).items()} == as_loaded(splits, name)
            else:                                          # by chance, of so few texts; a test below says more
                with pytest.raises(InputError, match="no example of"):
                    load_task(out, kind)
        assert load_new_users(out) == tuple(user for user in splits if is_new_user(user))


def test_every_kind_of_a_larger_task_loads_and_its_sizes_are_in_task_json(tmp_path):
    collect = Collector()
    for user in range(30):
        for text in range(user % 7, 200, 3 + user % 5):
            collect.add(user, text, f"text {text}", [LABELS[(user + text) % 3]])
    status, out = prepare(tmp_path, made_up_task(collect.examples))
    assert status == 0 and task_file.KINDS == tuple(KINDS)
    facts = json.loads((out / "task.json").read_text())["statistics"]
    for kind in KINDS:
        task = load_task(out, kind)
        assert {user: {each.id for name in SPLIT_NAMES for each in task.split(name)[user]}
                for user in task.users} == {str(u): set(map(str, own)) for u, own in collect.examples.items()}
        assert facts["split_sizes"][kind] == {name: len(task.pooled(name)) for name in SPLIT_NAMES}
        new = load_new_users(out) if kind == "new_users" else ()
        sizes = {user: {name: len(task.split(name)[user]) for name in SPLIT_NAMES} for user in task.users}
        empty = {user: own for user, own in sizes.items() if 0 in own.values() and user not in new}
        assert facts["users_with_empty_split"][kind] == empty and bool(empty) == (kind == "no_leak")
    assert 0 < len(new) == facts["new_users"] < 30
    task = load_task(out, "new_users")
    assert all(bool(task.val[user]) != (user in new) for user in task.users)


def test_users_who_lack_a_split_are_refused_or_left_out_if_asked(tmp_path):
    """A user whose labels are all different: the published split puts every example into `val`."""
    labels = tuple(f"label {i}" for i in range(11))
    examples = {"all different": {i: {"text": "t", "label": [label]} for i, label in enumerate(labels)},
                "all the same": {i: {"text": "t", "label": ["label 0"]} for i in range(11)}}
    _, out = prepare(tmp_path, Task("made_up", "Which?", labels, False, examples))
    with pytest.raises(InputError, match=r"no example of 1 user.*'all different'"):
        load_task(out)
    assert load_task(out, only_complete=True).users == ("all the same",)
    assert set(load_task(out, "strict").users) == set(examples)
    empty = json.loads((out / "task.json").read_text())["statistics"]["users_with_empty_split"]
    assert empty["leaked"] == {"all different": {"train": 0, "val": 11, "test": 0}} and empty["strict"] == {}


def test_a_generative_task_is_written_with_targets_and_refused_by_name(tmp_path):
    collect = Collector()
    for user in ("u", "v"):
        for text in range(20):
            collect.add_target(user, text, f"question {text}", f"answer of {user}")
    collect.add_target("u", 3, "question 3", "a second answer")
    task = Task("made_up", "Answer as this user would.", (), False, collect.examples, replaced=collect.replaced,
                generative=True, published_fields=("question", "answer"))
    _, out = prepare(tmp_path, task)
    lines = [json.loads(line) for name in SPLIT_NAMES for line in (out / f"{name}.jsonl").open()]
    assert len(lines) == 40 and all(list(line) == ["user", "id", "text", "target"] for line in lines)
    assert {line["target"] for line in lines if line["id"] == "3"} == {"a second answer", "answer of v"}
    described = json.loads((out / "task.json").read_text())
    assert described["generative"] and described["statistics"]["annotations_replaced"] == 1
    assert not described["statistics"].keys() & {"krippendorff_alpha_masi", "label_counts"}
    with pytest.raises(InputError, match=r"'made_up' is a generative task; needed one of labels"):
        load_task(out)
    loaded = load_task(out, generative=True)
    assert loaded.generative and {e.label for e in loaded.pooled("test")} <= {("a second answer",), ("answer of u",),
                                                                              ("answer of v",)}  # fmt: skip

    _, out = prepare(tmp_path, task, "--layout", "original")
    assert {path.name for path in out.iterdir()} == {
        "user_data_no_leak.json", "users-with-empty-dataset-splits.json", "task.json"}
    splits = KINDS["no_leak"](collect.examples)
    published = {user: {name: {i: {"question": each["text"], "answer": [each["target"]]} for i, each in part.items()}
                        for name, part in own.items()} for user, own in splits.items()}
    assert (out / "user_data_no_leak.json").read_text() == json.dumps(published)


def test_equal_examples_are_stored_once_and_further_fields_are_kept(tmp_path):
    collect = Collector()
    for user in ("u", "v"):
        for text in range(12):
            if text % 2:
                collect.add_example(user, f"t{text}", {"text": f"text {text}", "label": ["blue"], "round": text})
            else:
                collect.add(user, f"t{text}", f"text {text}", ["blue"])
    own = collect.examples
    assert own["u"]["t0"] is own["v"]["t0"] and own["u"]["t0"] != own["u"]["t2"]
    assert ("u", "t0") in collect and ("u", "t99") not in collect and ("w", "t0") not in collect
    _, out = prepare(tmp_path, made_up_task(own), "--layout", "original")
    leaked = json.loads((out / "user_data_leaked.json").read_text())["u"]
    assert (leaked["train"] | leaked["val"] | leaked["test"])["t5"] == {"text": "text 5", "label": ["blue"], "round": 5}
    _, out = prepare(tmp_path, made_up_task(own))
    assert all("round" not in json.loads(line) for line in (out / "train.jsonl").open())


def test_jsonl_lines_are_those_of_the_json_module():
    awkward = {"text": 'é\u2028"\\\n\x00\U0001f600', "label": ["blue", LABELS[2]]}
    line = {"user": "ü\t", "id": "5", **awkward}
    (written,) = common._jsonl_lines({"ü\t": {"train": {5: awkward}}}, "train")
    assert written == json.dumps(line) + "\n"


# The environments in which one task is prepared: text encodings are ours, not the locale's.
ENVIRONMENTS = [
    {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
    {"PYTHONHASHSEED": "1", "LC_ALL": "C"},
    {"PYTHONHASHSEED": "2", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LANG": "C", "LC_NUMERIC": "C", "TZ": "Asia/Tokyo"},
]


def test_same_bytes_whatever_hash_seed_locale_and_order_of_the_folder(tmp_path):
    prepared = []
    for number, environment in enumerate(ENVIRONMENTS):
        raw = tmp_path / f"raw{number}/studemo"
        raw.mkdir(parents=True)
        names = ["annotation_data.csv", "text_data.csv", "a note.txt", "text_data.csv.gz"]
        for name in names if number % 2 else reversed(names):
            (raw / name).write_bytes(studemo_file(name))
        run = subprocess.run(
            [sys.executable, f"{SCRIPTS}/prepare_studemo.py", "--raw", str(raw.parent), "--out", f"out{number}"],
            cwd=tmp_path, capture_output=True, env={"PATH": os.environ["PATH"]} | environment)
        assert run.returncode == 0, run.stderr
        out = tmp_path / f"out{number}"
        prepared.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert len(prepared[0]) == 14 and all(files == prepared[0] for files in prepared)


def studemo_file(name):
    """A small file of that name, with characters beyond ASCII; of those that are not asked for, anything."""
    labels = ["joy", "trust", "anticipation", "surprise", "fear", "sadness", "disgust", "anger", "valence", "arousal"]
    rows = {
        "text_data.csv": [["text_id", "text"], *([f"t{i}", f"Größe {i} \U0001f375"] for i in range(25))],
        "annotation_data.csv": [["text_id", "annotator_id", *labels], *(
            [f"t{i}", f"ü{user}", *(str((i * user + k) % 4) for k in range(10))]
            for user in range(1, 7) for i in range(25))],
    }.get(name, [["not read"]])
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
        file.seek(0)
        return file.read().encode()
