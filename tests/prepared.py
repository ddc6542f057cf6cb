"""What the tests of prepare scripts share: raw files made up or real, the real command, and what it wrote.

Every made-up text has the word "soup", so that a message which quotes a text is found out.
"""

import csv
import hashlib
import json
import os
from pathlib import Path

import pytest
from common import main

ROOT = Path(__file__).resolve().parents[1]
RAW = Path(os.environ.get("MINIPEFT_RAW") or ROOT.parent / "shared/data/raw")


def needs_raw(dataset):
    """A mark: skip where the raw files of this dataset are not at hand."""
    reason = f"no {dataset} folder in $MINIPEFT_RAW or ../shared/data/raw"
    return pytest.mark.skipif(not (RAW / dataset).is_dir(), reason=reason)


def write_table(path, header, rows, delimiter=",", line_end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator=line_end).writerows([header, *rows])


def prepare(script, raw, out, *options):
    """Runs the command of the module `script`; returns the folder of its first task."""
    assert main(script.SOURCE, script.read_tasks, ["--raw", str(raw), "--out", str(out), *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(script.SOURCE.tasks)
    return out / script.SOURCE.tasks[0]


def assert_refused(script, tmp_path, capsys, *expected):
    """The command on tmp_path/raw ends with one line that says all of `expected`, quotes no text and writes nothing."""
    out = tmp_path / "refused"
    capsys.readouterr()
    assert main(script.SOURCE, script.read_tasks, ["--raw", str(tmp_path / "raw"), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == "" and not out.exists()
    assert "soup" not in captured.err
    for part in expected:
        assert part in captured.err


def assert_bad_row(script, tmp_path, capsys, where, reason):
    """The row at `where` stops the command; --skip-bad counts it. Returns the folder of the first task then."""
    assert_refused(script, tmp_path, capsys, where, reason)
    task = prepare(script, tmp_path / "raw", tmp_path / "out", "--skip-bad")
    (found, count), = facts(task)["bad_rows"].items()
    assert reason in found and count == 1
    return task


def assert_published(script, raw, out, sha256):
    """The original layout has these hashes, {task: {kind of split: first digits}}."""
    prepare(script, raw, out, "--layout", "original")
    found = {
        task: {kind: digest((out / task / f"user_data_{kind}.json").read_bytes()) for kind in kinds}
        for task, kinds in sha256.items()
    }
    assert found == sha256


def digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def facts(task):
    return json.loads((task / "task.json").read_text())["statistics"]


def assert_counts(task, users, texts, pairs, kept, alpha, labels):
    """The statistics are those of an independent count of the raw files."""
    found = facts(task)
    assert (found["users"], found["texts"], found["pairs"], found["users_kept"]) == (users, texts, pairs, kept)
    assert len(found["users_dropped"]["fewer than 10 examples"]) == users - kept
    assert round(found["krippendorff_alpha_masi"], 3) == alpha
    assert found["label_counts"] == labels
    assert found["bad_rows"] == {} and found["annotations_replaced"] == 0


def examples(task):
    """{(user, text id): (text, labels)} of all three splits of the jsonl layout."""
    lines = [json.loads(line) for name in ("train", "val", "test") for line in (task / f"{name}.jsonl").open()]
    return {(line["user"], line["id"]): (line["text"], line["label"]) for line in lines}


def labels(task):
    return {key: labels for key, (_, labels) in examples(task).items()}
