"""Does prepare_tweeteval.py give the published task, write it whole or not at all, and say clearly what is wrong?"""

import csv
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import folders
import prepare_tweeteval
import pytest
from common import main
from folders import write_folder
from raw_files import BadInput

ROOT = Path(__file__).resolve().parents[1]
RAW = Path(os.environ.get("MINIPEFT_RAW") or ROOT.parent / "shared/data/raw")
needs_raw = pytest.mark.skipif(
    not (RAW / "tweeteval").is_dir(), reason="no tweeteval folder in $MINIPEFT_RAW or ../shared/data/raw"
)

# sha256 of the published code's files on the real raw file (their first 16 digits).
PUBLISHED_SHA256 = {"user_data_leaked.json": "f129716c363981f2", "user_data_no_leak.json": "825ad4a52c90f4f4"}
FLEISS_KAPPA = 0.1476217606352577                         # of group G3, printed in the data set authors' own notebook

HEADER = ["id", "text", "ann", "ben", "cleo"]
ROWS = [
    [str(100 - i), f'day {i}, "quoted"\nand a second line', *("Non-hateful" if i % k else "Hateful" for k in (2, 3, 5))]
    for i in range(20)
]


def write_raw(folder, header=HEADER, rows=ROWS):
    """A raw folder with harmless texts, of commas, quotes and line breaks."""
    path = folder / "tweeteval/annotations_g3.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def run(raw, out, *options, hash_seed="random"):
    script = [sys.executable, str(ROOT / "data_scripts/prepare_tweeteval.py"), "--raw", str(raw), "--out", str(out)]
    return subprocess.run([*script, *options], capture_output=True, text=True, cwd=out.parent,
                          env=os.environ | {"PYTHONHASHSEED": hash_seed})


def prepare(raw, out, *options):
    argv = ["--raw", str(raw), "--out", str(out), *options]
    assert main(prepare_tweeteval.SOURCE, prepare_tweeteval.read_tasks, argv) == 0
    return out / "tweeteval"


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_raw
def test_real_files_are_those_of_the_published_code(tmp_path):
    task = prepare(RAW, tmp_path, "--layout", "original")
    for name, sha256 in PUBLISHED_SHA256.items():
        assert hashlib.sha256((task / name).read_bytes()).hexdigest().startswith(sha256), name
    leaked = json.loads((task / "user_data_leaked.json").read_text())
    assert list(leaked["label_M_1"]["test"])[:8] == ["149", "65", "40", "146", "36", "164", "120", "124"]
    empty = json.loads((task / "users-with-empty-dataset-splits.json").read_text())
    assert empty == {"leaked": {}, "no_leak": {}}


@needs_raw
def test_real_statistics(tmp_path):
    task = json.loads((prepare(RAW, tmp_path) / "task.json").read_text())
    facts = task["statistics"]
    assert (facts["users"], facts["texts"], facts["pairs"], facts["users_kept"]) == (20, 200, 4000, 20)
    assert (facts["examples_per_user"], facts["users_per_text"]) == (200, 20)
    assert facts["label_counts"] == {"Hateful": 2632, "Non-hateful": 1368}
    assert task["labels"] == ["Hateful", "Non-hateful"] and not task["multi_label"]
    # With two labels and as many labellings of every text, alpha is Fleiss' kappa and a correction for the sample size.
    assert facts["krippendorff_alpha_masi"] == pytest.approx(1 - (1 - FLEISS_KAPPA) * (1 - 1 / 4000), abs=1e-9)


def test_jsonl_holds_the_original_splits_line_by_line(tmp_path):
    write_raw(tmp_path / "raw")
    original = prepare(tmp_path / "raw", tmp_path / "original", "--layout", "original")
    jsonl = prepare(tmp_path / "raw", tmp_path / "jsonl")
    for kind, folder in {"leaked": jsonl, "no_leak": jsonl / "splits/no_leak"}.items():
        splits = json.loads((original / f"user_data_{kind}.json").read_text())
        for name in ("train", "val", "test"):
            expected = [
                {"user": user, "id": text_id, **example}
                for user, own in splits.items() for text_id, example in own[name].items()
            ]
            assert [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] == expected
    assert set(files_of(original)) == {*PUBLISHED_SHA256, "users-with-empty-dataset-splits.json", "task.json"}
    assert len(files_of(jsonl)) == 4 * 3 + 2


def test_task_json_says_what_was_read_and_what_was_left_out(tmp_path):
    path = write_raw(tmp_path / "raw")
    task = json.loads((prepare(tmp_path / "raw", tmp_path / "out") / "task.json").read_text())
    assert task["name"] == "tweeteval" and "Hateful" in task["instruction"]
    assert task["raw_sha256"] == {"tweeteval/annotations_g3.csv": hashlib.sha256(path.read_bytes()).hexdigest()}
    facts = task["statistics"]
    assert facts["pairs"] == sum(facts["label_counts"].values()) == sum(facts["split_sizes"]["leaked"].values()) == 60
    assert facts["users_dropped"] == {"fewer than 10 examples": {}} and facts["rows_skipped"] == {}
    assert task["sample"] is None and "python" in task["versions"]


def test_same_bytes_on_every_run(tmp_path):
    write_raw(tmp_path / "raw")
    for seed in ("0", "1"):
        result = run(tmp_path / "raw", tmp_path / seed, hash_seed=seed)
        assert result.returncode == 0, result.stderr
    assert files_of(tmp_path / "0") == files_of(tmp_path / "1") != {}


def test_carriage_returns_and_byte_order_mark_do_not_change_the_texts(tmp_path):
    path = write_raw(tmp_path / "raw")
    before = files_of(prepare(tmp_path / "raw", tmp_path / "before"))
    content = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content)
    after = files_of(prepare(tmp_path / "raw", tmp_path / "after"))
    assert {name for name in before if before[name] != after[name]} == {"task.json"}     # only the raw file's sha256


def test_sampling_users(tmp_path):
    write_raw(tmp_path / "raw")
    sampled = [prepare(tmp_path / "raw", tmp_path / seed, "--users", "2", "--seed", seed) for seed in "01234"]
    users = [{json.loads(line)["user"] for line in (task / "train.jsonl").read_text().splitlines()} for task in sampled]
    assert all(len(names) == 2 for names in users) and len(set(map(frozenset, users))) > 1
    task = json.loads((sampled[3] / "task.json").read_text())
    assert task["sample"] == {"users": 2, "seed": 3} and task["statistics"]["users"] == 2


def broken_row(number, row):
    return [*ROWS[:number], row, *ROWS[number + 1:]]


# What is wrong -> (header, rows, what the message says). Every row of ROWS takes two lines of the file.
BAD_FILES = {
    "no id column": (["number", *HEADER[1:]], ROWS, ["line 1", "missing column 'id'"]),
    "no text column": (["id", "tweet", *HEADER[2:]], ROWS, ["line 1", "missing column 'text'"]),
    "no user column": (HEADER[:2], [row[:2] for row in ROWS], ["line 2", "no column of a user"]),
    "a user twice": (["id", "text", "ann", "ben", "ann"], ROWS, ["line 1", "same name"]),
    "a short row": (HEADER, broken_row(3, ROWS[3][:4]), ["line 8", "4 fields", "header has 5"]),
    "a long row": (HEADER, broken_row(0, [*ROWS[0], "Hateful"]), ["line 2", "6 fields"]),
    "an unknown label": (HEADER, broken_row(1, [*ROWS[1][:4], "maybe"]), ["line 4", "'cleo'", "neither 'Hateful'"]),
    "no rows": (HEADER, [], ["no rows"]),
    "too few texts": (HEADER, ROWS[:9], ["no user of tweeteval has 10 examples"]),
}


@pytest.mark.parametrize("header, rows, expected", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_is_one_clear_line_and_writes_nothing(tmp_path, capsys, header, rows, expected):
    write_raw(tmp_path / "raw", header, rows)
    assert_one_line(tmp_path, capsys, *expected)


def test_bad_bytes_and_empty_file(tmp_path, capsys):
    path = write_raw(tmp_path / "raw")
    path.write_bytes(path.read_bytes().replace(b"day 2,", b"day \xff,"))
    assert_one_line(tmp_path, capsys, "annotations_g3.csv, line 6", "UTF-8")
    path.write_bytes(b"")
    assert_one_line(tmp_path, capsys, "annotations_g3.csv", "missing column 'id', 'text'")
    path.write_text("id,text,ann\n1," + "x" * 200_000 + ",Hateful\n")
    assert_one_line(tmp_path, capsys, "line 2", "not readable as CSV")


def test_missing_folder_missing_file_and_too_many_users(tmp_path, capsys):
    assert_one_line(tmp_path, capsys, "raw/tweeteval: no such folder", "--raw")
    write_raw(tmp_path / "raw")
    assert_one_line(tmp_path, capsys, "--users 4", "only 3 users", options=("--users", "4"))
    (tmp_path / "raw/tweeteval/annotations_g3.csv").unlink()
    assert_one_line(tmp_path, capsys, "annotations_g3.csv", "No such file")


def assert_one_line(tmp_path, capsys, *expected, options=()):
    out = tmp_path / "out"
    argv = ["--raw", str(tmp_path / "raw"), "--out", str(out), *options]
    assert main(prepare_tweeteval.SOURCE, prepare_tweeteval.read_tasks, argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == "" and not out.exists()
    for part in expected:
        assert part in captured.err
    assert "day" not in captured.err                       # never a text


def test_bad_input_from_the_command_line_has_no_traceback(tmp_path):
    result = run(tmp_path / "nowhere", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_anything_unexpected_keeps_its_traceback(tmp_path):
    def broken_reader(raw):
        raise KeyError("a bug of ours")

    write_raw(tmp_path / "raw")
    with pytest.raises(KeyError):
        main(prepare_tweeteval.SOURCE, broken_reader, ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")])


def test_a_new_run_replaces_the_whole_folder(tmp_path):
    write_raw(tmp_path / "raw")
    prepare(tmp_path / "raw", tmp_path / "out", "--layout", "original")
    task = prepare(tmp_path / "raw", tmp_path / "out")
    assert len(files_of(task)) == 4 * 3 + 2 and not (task / "user_data_leaked.json").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tweeteval"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_while_writing_leaves_the_old_task_untouched(tmp_path, monkeypatch, capsys, call):
    def fail_on_new(path, target):
        if path.name.endswith(".new"):
            raise OSError(errno.ENOSPC, "disk full")
        return os.rename(path, target)

    def fail(handle):
        raise OSError(errno.ENOSPC, "disk full")

    write_raw(tmp_path / "raw")
    task = prepare(tmp_path / "raw", tmp_path / "out")
    before = files_of(task)
    with monkeypatch.context() as patch:
        patch.setattr(*((folders.os, "fsync", fail) if call == "fsync" else (Path, "rename", fail_on_new)))
        assert main(prepare_tweeteval.SOURCE, prepare_tweeteval.read_tasks,
                    ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--users", "2"]) == 2
    assert "cannot be written (disk full)" in capsys.readouterr().err
    assert files_of(task) == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tweeteval"]


def test_a_folder_of_someone_else_is_never_replaced(tmp_path, capsys):
    path = write_raw(tmp_path / "raw")
    content = path.read_bytes()
    argv = ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "raw")]      # the task would replace the raw folder
    assert main(prepare_tweeteval.SOURCE, prepare_tweeteval.read_tasks, argv) == 2
    assert "no task.json" in capsys.readouterr().err
    assert path.read_bytes() == content


def test_out_that_is_a_file_is_bad_input(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(BadInput, match="cannot make this folder"):
        write_folder(tmp_path / "out" / "task", [("task.json", ["{}"])])
