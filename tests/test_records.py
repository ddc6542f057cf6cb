"""Is a record read back as it was written, and is a damaged one an error that names file and field?"""

import json
from dataclasses import replace

import pytest

from minipeft.errors import InputError
from minipeft.peftu.records import Record, load_record, load_records, record_path, save_record

RECORD = Record(
    task="sarcasm", name="lora", kind="personal", seed=3, digest="ab12", users=["ann", "bob"],
    correct=[[1, 0, 1], [0.5]], num_train=[12, 4], metrics={"macro_f1": [0.6, None]},
    pooled={"macro_f1": 0.6, "ece": 0.1}, paper_accuracy=[0.5, 1.0],
    method={"name": "lora", "rank": 8}, trainable=1024, bytes_per_user=4096, train_flops_per_user=1e9,
    train_seconds=2.5, peak_memory_mb=None, val_loss=[[0.7, 0.6], [0.9, None]],
    movement={"layers.0.attn.q": {"median": 0.2, "min": 0.0}}, chosen_lr=1e-3, lr_grid={1e-3: 0.7, 1e-2: 0.6},
    notes={"texts cut": 3}, cold_start={0: [0.5, 0.5], 8: [0.75, None]},
)  # fmt: skip


def test_a_record_comes_back_as_it_was(tmp_path):
    path = save_record(tmp_path, RECORD)
    assert path == tmp_path / "records" / "sarcasm" / "lora-s3.json" and load_record(path) == RECORD
    assert RECORD.accuracy == pytest.approx([2 / 3, 0.5])
    assert [file.name for file in path.parent.iterdir()] == ["lora-s3.json"]  # no temporary file stays


def test_a_record_of_before_a_field_was_there_has_its_default(tmp_path):
    path = save_record(tmp_path, replace(RECORD, answered=[[0, 1, 4], [2]]))
    assert load_record(path).answered == [[0, 1, 4], [2]]
    content = json.loads(path.read_text())
    del content["answered"]
    path.write_text(json.dumps(content))
    assert load_record(path) == RECORD and RECORD.answered is None


@pytest.mark.parametrize("task", ["../up", "..", "a/b", "<script>", "ein Wort", "ü"])
def test_any_text_is_a_safe_name(tmp_path, task):
    path = save_record(tmp_path, replace(RECORD, task=task))
    assert path.parent.parent == tmp_path / "records" and load_records(tmp_path)[0].task == task


def test_records_come_sorted_and_a_folder_without_any_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no records in it"):
        load_records(tmp_path)
    for name, seed in (("prompt", 0), ("lora", 10), ("lora", 2)):
        save_record(tmp_path, replace(RECORD, name=name, seed=seed))
    assert [(r.name, r.seed) for r in load_records(tmp_path)] == [("lora", 2), ("lora", 10), ("prompt", 0)]


def test_a_file_under_anothers_name_is_refused(tmp_path):
    path = save_record(tmp_path, RECORD)
    path.rename(record_path(tmp_path, "sarcasm", "prompt", 3))
    with pytest.raises(InputError, match="holds the record of 'sarcasm', 'lora', seed 3"):
        load_records(tmp_path)


WRONG = {
    "a missing field": (lambda r: r.pop("users"), "no field 'users'"),
    "a field too many": (lambda r: r.update(extra=1), "an unknown field 'extra'"),
    "another type": (lambda r: r.update(seed="3"), "field seed: came str; needed int"),
    "a truth value for a number": (lambda r: r.update(trainable=True), "field trainable: came bool"),
    "another type inside": (lambda r: r["correct"][1].append("1"), r"field correct\[1\]\[1\]: came str; needed float"),
    "a key that is no number": (lambda r: r.update(lr_grid={"low": 1.0}), "field lr_grid: came the key 'low'"),
    "an unknown kind": (lambda r: r.update(kind="own"), "field kind: came 'own'"),
    "a user twice": (lambda r: r.update(users=["ann", "ann"]), "field users: needed at least one, and each once"),
    "a user too few": (lambda r: r["num_train"].pop(), "field num_train: came 1 values; needed one for each of 2"),
    "a metric too short": (lambda r: r["metrics"]["macro_f1"].pop(), "field metrics.macro_f1: came 1 values"),
    "percent for scores": (lambda r: r.update(paper_accuracy=[50, 100]), "field paper_accuracy: needed scores from 0"),
    "percent for fixed": (lambda r: r.update(fixed_accuracy=[50, 100]), "field fixed_accuracy: needed scores from 0"),
    "of one user": (lambda r: r.update(fixed_accuracy=[0.5]), "field fixed_accuracy: came 1 values"),
    "nobody scored": (lambda r: r["correct"].__setitem__(1, []), "field correct of 'bob': needed scores"),
    "not a finite number": (lambda r: r.update(train_seconds=float("nan")), "field train_seconds: came nan"),
    "places that are not of the scores": (lambda r: r.update(answered=[[0, 1], [3]]), "field answered: needed each"),
    "no name": (lambda r: r.update(name=""), "field task, name: needed"),
}


@pytest.mark.parametrize("damage, message", WRONG.values(), ids=WRONG.keys())
def test_a_damaged_record_names_file_and_field(tmp_path, damage, message):
    path = save_record(tmp_path, RECORD)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        load_record(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b'{"task": "sar', b"[]", b"\xff"])
def test_half_a_file_is_an_error(tmp_path, content):
    path = save_record(tmp_path, RECORD)
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        load_record(path)
